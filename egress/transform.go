package egress

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/cayhq/cay"
)

// transform is a compiled [cay.EgressRule].
type transform struct {
	name    string // as the policy has it
	headers []header
}

// header is one to set; its value is the concatenation of parts.
type header struct {
	name  string
	parts []part
}

// part is a text, the name of a secret, or that of an identity token.
type part struct{ text, secret, token string }

// placeholder is what the SDK's Secret.fill and iam.tokens write.
var placeholder = regexp.MustCompile(`\$\{e2b\.(secrets|identity\.tokens)\.([^{}]+)\}`)

// fieldName is a token of RFC 9110, section 5.6.2.
var fieldName = regexp.MustCompile("^[a-zA-Z0-9!#$%&'*+.^_`|~-]+$")

// validValue reports whether HTTP allows a field's value: no control
// characters but the tab (RFC 9110, section 5.5).
func validValue(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f })
}

func newTransform(r cay.EgressRule) (*transform, error) {
	t := &transform{name: r.Name}
	for name, value := range r.Headers {
		if !fieldName.MatchString(name) || !validValue(value) {
			return nil, &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerNetwork,
				Message: fmt.Sprintf("the rule for %s sets a header %q that HTTP does not allow", r.Name, name),
				Fix:     "use letters, digits and hyphens in the name and no line break in the value"}
		}
		h, rest := header{name: http.CanonicalHeaderKey(name)}, value
		for {
			m := placeholder.FindStringSubmatchIndex(rest)
			if m == nil {
				break
			}
			if m[0] > 0 {
				h.parts = append(h.parts, part{text: rest[:m[0]]})
			}
			if kind, name := rest[m[2]:m[3]], rest[m[4]:m[5]]; kind == "secrets" {
				h.parts = append(h.parts, part{secret: strings.ToLower(name)})
			} else {
				h.parts = append(h.parts, part{token: name})
			}
			rest = rest[m[1]:]
		}
		if rest != "" {
			h.parts = append(h.parts, part{text: rest})
		}
		t.headers = append(t.headers, h)
	}
	return t, nil
}

// resolve returns the headers with their values, asking for each secret once.
// Its errors name secrets and never hold a value.
func (t *transform) resolve(ctx context.Context, secret func(context.Context, string) (cay.Secret, error)) (http.Header, error) {
	out, known := http.Header{}, map[string]string{}
	for _, h := range t.headers {
		var b strings.Builder
		for _, p := range h.parts {
			switch {
			case p.token != "":
				return nil, &cay.Error{Code: cay.CodeNotImplemented, Layer: cay.LayerNetwork,
					Message: fmt.Sprintf("the rule for %s needs the identity token %q, and this build of Cay issues none", t.name, p.token),
					Fix:     "use a secret in the rule: ${e2b.secrets.NAME}"}
			case p.secret != "":
				v, ok := known[p.secret]
				if !ok {
					s, err := secret(ctx, p.secret)
					if err != nil {
						return nil, fmt.Errorf("resolving the secret %q for %s: %w", p.secret, t.name, err)
					}
					v = s.Reveal()
					known[p.secret] = v
				}
				b.WriteString(v)
			default:
				b.WriteString(p.text)
			}
		}
		if !validValue(b.String()) {
			return nil, &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerNetwork,
				Message: fmt.Sprintf("the header %s of the rule for %s has a line break in its value", h.name, t.name),
				Fix:     "look for one at the end of the secret"}
		}
		out.Set(h.name, b.String())
	}
	return out, nil
}
