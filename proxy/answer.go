package proxy

import (
	"bytes"
	"encoding/json"
	"html/template"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay"
)

// answer is what the proxy itself says instead of the sandbox. Field names are
// the contract's (section 4).
type answer struct {
	SandboxID string `json:"sandboxId,omitempty"`
	Message   string `json:"message"`
	Port      int    `json:"port,omitempty"`
	Path      string `json:"path,omitempty"`
	Limit     int    `json:"connectionLimit,omitempty"`
	Code      int    `json:"code"`

	// title and help are for the page a browser gets.
	title, help string
	retryAfter  int // seconds
}

func notFound(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusBadGateway,
		Message: "The sandbox was not found",
		title:   "Sandbox Not Found",
		help:    "It may have been killed, or its time ran out. A sandbox that is gone does not come back: create a new one."}
}

func portClosed(t target) answer {
	return answer{SandboxID: string(t.sandbox), Port: int(t.port), Code: http.StatusBadGateway,
		Message: "The sandbox is running but port is not open",
		title:   "Port Not Open",
		help: "The sandbox runs, but there is no service running on port " + strconv.Itoa(int(t.port)) +
			". Start one in the sandbox, then load this page again."}
}

func noAnswer(t target) answer {
	return answer{SandboxID: string(t.sandbox), Port: int(t.port), Code: http.StatusBadGateway,
		Message: "The service in the sandbox closed the connection without a valid answer",
		title:   "No Answer",
		help:    "The service on port " + strconv.Itoa(int(t.port)) + " accepted the connection and ended it before it answered. Look at its output in the sandbox."}
}

func tooSlow(t target) answer {
	return answer{SandboxID: string(t.sandbox), Port: int(t.port), Code: http.StatusGatewayTimeout,
		Message: "The sandbox did not accept the connection in time",
		title:   "No Answer In Time",
		help:    "The sandbox runs, but it is too busy to accept connections on port " + strconv.Itoa(int(t.port)) + ". Try again in a moment."}
}

func tokenMissing(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusForbidden,
		Message: "The traffic access token is missing: send it in the header 'e2b-traffic-access-token'",
		title:   "Missing Traffic Access Token",
		help:    "This sandbox takes no public traffic. Send its traffic access token in the header e2b-traffic-access-token."}
}

func tokenWrong(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusForbidden,
		Message: "The traffic access token is wrong: the header 'e2b-traffic-access-token' holds another value than the one the sandbox was created with",
		title:   "Invalid Traffic Access Token",
		help:    "The header e2b-traffic-access-token holds another value than the one this sandbox was created with."}
}

func controlRoute(path string) answer {
	return answer{Path: path, Code: http.StatusNotFound,
		Message: "This path is reserved for the E2B control plane",
		title:   "Reserved Path",
		help:    "This path of the sandbox's daemon is reserved for the control plane."}
}

func tooMany(id cay.SandboxID, limit int) answer {
	return answer{SandboxID: string(id), Limit: limit, Code: http.StatusTooManyRequests, retryAfter: 1,
		Message: "The sandbox has too many open connections",
		title:   "Too Many Connections",
		help:    "This sandbox has reached its limit of " + strconv.Itoa(limit) + " open connections. Close some, or try again in a moment."}
}

func resumeDenied(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusForbidden,
		Message: "The sandbox is paused and the request may not resume it: send its access token in the header 'X-Access-Token'",
		title:   "Sandbox Paused",
		help:    "This sandbox is paused, and only a request with its access token resumes it."}
}

func inTransition(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusConflict, retryAfter: 1,
		Message: "The sandbox is still changing its state; try again",
		title:   "Sandbox Not Ready",
		help:    "The sandbox is being paused or resumed, and this takes longer than usual. Load this page again in a moment."}
}

func teamFull(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusTooManyRequests, retryAfter: 1,
		Message: "The sandbox is paused and cannot be resumed: its team has as many sandboxes as it may have",
		title:   "Too Many Sandboxes",
		help:    "This sandbox is paused. Its team has as many running sandboxes as it may have: one of them must end before this one resumes."}
}

func parkFull(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusTooManyRequests, retryAfter: 1,
		Message: "Too many requests wait for sandboxes to resume; try again",
		title:   "Too Many Requests",
		help:    "Too many requests wait for paused sandboxes. Load this page again in a moment."}
}

func cannotWake(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusBadGateway,
		Message: "The sandbox is paused and could not be resumed; it is as it was",
		title:   "Sandbox Not Resumed",
		help:    "This sandbox is paused, and resuming it failed. Nothing of it is lost; its logs say why."}
}

func unavailable(id cay.SandboxID) answer {
	return answer{SandboxID: string(id), Code: http.StatusServiceUnavailable, retryAfter: 1,
		Message: "The proxy cannot tell now where the sandbox is; try again",
		title:   "Try Again",
		help:    "The proxy cannot tell at this moment where the sandbox is. The sandbox itself is not affected."}
}

// write sends the answer as a page to a browser that navigates and as JSON to
// everyone else.
func (a answer) write(w http.ResponseWriter, r *http.Request) {
	hurry(w, r, restTime)
	h := w.Header()
	h.Set("Cache-Control", "no-store") // the next request may find the sandbox
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Vary", "Accept, User-Agent, Sec-Fetch-Mode, X-Requested-With")
	if a.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(a.retryAfter))
	}
	var b bytes.Buffer
	if navigates(r) {
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		_ = page.Execute(&b, struct {
			Title, Help, SandboxID string
			Code                   int
		}{a.title, a.help, a.SandboxID, a.Code}) // a bytes.Buffer takes everything
	} else {
		h.Set("Content-Type", "application/json; charset=utf-8")
		_ = json.NewEncoder(&b).Encode(a)
	}
	h.Set("Content-Length", strconv.Itoa(b.Len()))
	w.WriteHeader(a.Code)
	_, _ = w.Write(b.Bytes()) // the client may be gone
}

// badRequest answers a request that names no target. Plain text, as upstream.
func badRequest(w http.ResponseWriter, r *http.Request, why string) {
	hurry(w, r, restTime)
	w.Header().Set("Cache-Control", "no-store")
	http.Error(w, why, http.StatusBadRequest)
}

// restTime is how long the rest of a body may take that nobody wants.
const restTime = 5 * time.Second

// hurry bounds what is still to come of a body that does not go to a sandbox.
func hurry(w http.ResponseWriter, r *http.Request, within time.Duration) {
	if r.ContentLength != 0 {
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(within)) // a recorder has none
	}
}

var browser = regexp.MustCompile(`(?i)mozilla|chrome|safari|firefox|edge|opera|msie`)

// navigates reports whether a person looks at the answer: a browser that loads
// a page, rather than a script in it (contract, section 4).
func navigates(r *http.Request) bool {
	if !browser.MatchString(r.UserAgent()) || r.Header.Get("X-Requested-With") != "" {
		return false
	}
	switch strings.ToLower(r.Header.Get("Sec-Fetch-Mode")) {
	case "cors", "no-cors", "same-origin", "websocket":
		return false
	}
	accept := strings.ToLower(strings.Join(r.Header.Values("Accept"), ","))
	jsonOnly := strings.Contains(accept, "json") && !strings.Contains(accept, "text/html") &&
		!strings.Contains(accept, "application/xhtml")
	return !jsonOnly
}

var page = template.Must(template.New("answer").Parse(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{.Title}}</title>
<style>
:root{color-scheme:light dark}
body{margin:0;min-height:100vh;display:grid;place-items:center;font:16px/1.6 system-ui,sans-serif;background:#f6f1e7;color:#2b2a27}
main{max-width:34rem;padding:2rem}
h1{font-size:1.5rem;line-height:1.3;margin:0 0 .75rem}
p{margin:0 0 .75rem}
small,code{color:#77726a}
code{font:0.9em ui-monospace,monospace;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#1d1c1a;color:#ece7dc}small,code{color:#a29c90}}
</style>
</head>
<body>
<main>
<small>{{.Code}}</small>
<h1>{{.Title}}</h1>
<p>{{.Help}}</p>
{{if .SandboxID}}<p><small>Sandbox</small> <code>{{.SandboxID}}</code></p>{{end}}
</main>
</body>
</html>
`))
