package lint

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"io/fs"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cayhq/cay"
)

// Markdown reads every Markdown file of the module, by name.
func Markdown(fsys fs.FS) (map[string]string, error) {
	out := map[string]string{}
	err := fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && p != "." && (strings.HasPrefix(path.Base(p), ".") || path.Base(p) == "node_modules" || path.Base(p) == "testdata" || p == "bin"):
			return fs.SkipDir
		case e.IsDir() || !strings.HasSuffix(p, ".md"):
			return nil
		}
		b, err := fs.ReadFile(fsys, p)
		out[p] = string(b)
		return err
	})
	return out, err
}

var (
	link    = regexp.MustCompile(`\[[^\]]*\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`^#+ +(.*?)\s*$`)
	code    = regexp.MustCompile("`[^`]*`")
	notSlug = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// prose calls f with every line of a Markdown text that is outside of fenced
// code.
func prose(text string, f func(n int, line string)) {
	fenced, n := false, 0
	for line := range strings.Lines(text) {
		n++
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			fenced = !fenced
			continue
		}
		if !fenced {
			f(n, strings.TrimRight(line, "\r\n"))
		}
	}
}

// anchors lists the fragments that the headings of a text make.
func anchors(text string) []string {
	var out []string
	prose(text, func(_ int, line string) {
		if m := heading.FindStringSubmatch(line); m != nil {
			s := notSlug.ReplaceAllString(strings.ToLower(m[1]), "")
			out = append(out, strings.ReplaceAll(s, " ", "-"))
		}
	})
	return out
}

// CheckLinks finds links to files and headings that do not exist.
func CheckLinks(fsys fs.FS, docs map[string]string) []Finding {
	var out []Finding
	for name, text := range docs {
		prose(text, func(n int, line string) {
			for _, m := range link.FindAllStringSubmatch(code.ReplaceAllString(line, ""), -1) {
				if why := deadLink(fsys, docs, name, m[1]); why != "" {
					out = append(out, Finding{fmt.Sprintf("%s:%d", name, n), why})
				}
			}
		})
	}
	return out
}

func deadLink(fsys fs.FS, docs map[string]string, from, to string) string {
	u, err := url.Parse(to)
	if err != nil {
		return fmt.Sprintf("the link %s is malformed", to)
	}
	if u.Scheme != "" {
		return "" // another site: not ours to prove
	}
	target := from
	if u.Path != "" {
		target = path.Join(path.Dir(from), u.Path)
		if _, err := fs.Stat(fsys, target); err != nil {
			return fmt.Sprintf("the link %s leads nowhere", to)
		}
	}
	if u.Fragment != "" && !slices.Contains(anchors(docs[target]), u.Fragment) {
		return fmt.Sprintf("the link %s names a heading that does not exist", to)
	}
	return ""
}

// document is how a comment names a document of the module.
var document = regexp.MustCompile(`[A-Za-z0-9_./-]+\.md\b`)

// CheckComments finds documents that comments name and that do not exist, in
// the package's directory or in the root. "e2b.md" is the wire contract, which
// is not ours to publish.
func CheckComments(fsys fs.FS, t *Tree) []Finding {
	var out []Finding
	for _, d := range t.Dirs {
		for _, f := range d.Files {
			if ast.IsGenerated(f.AST) {
				continue
			}
			for _, group := range f.AST.Comments {
				for _, name := range document.FindAllString(group.Text(), -1) {
					_, here := fs.Stat(fsys, path.Join(d.Path, name))
					_, top := fs.Stat(fsys, path.Clean(name))
					if here != nil && top != nil && path.Base(name) != "e2b.md" {
						out = append(out, Finding{fmt.Sprintf("%s:%d", f.Name, t.Fset.Position(group.Pos()).Line),
							fmt.Sprintf("the comment names %s, which does not exist", name)})
					}
				}
			}
		}
	}
	return out
}

// testName is how a document names a Go test: its directory, a dot, the
// function, and perhaps a subtest.
var testName = regexp.MustCompile("`([A-Za-z0-9_./-]*?)\\.((?:Test|Fuzz|Benchmark)[A-Za-z0-9_]*)(?:/[^`]*)?`")

// tests lists the test functions of the tree, as documents name them. Those of
// the root have the directory "cay".
func tests(t *Tree) map[string]bool {
	out := map[string]bool{}
	for _, d := range t.Dirs {
		dir := d.Path
		if dir == "." {
			dir = "cay"
		}
		for _, f := range d.Files {
			for _, decl := range f.AST.Decls {
				fn, ok := decl.(*ast.FuncDecl)
				if ok && f.Test && fn.Recv == nil && testName.MatchString("`."+fn.Name.Name+"`") {
					out[dir+"."+fn.Name.Name] = true
				}
			}
		}
	}
	return out
}

// CheckTests finds tests that documents name and that do not exist.
func CheckTests(t *Tree, docs map[string]string) []Finding {
	have := tests(t)
	var out []Finding
	for name, text := range docs {
		prose(text, func(n int, line string) {
			for _, m := range testName.FindAllStringSubmatch(line, -1) {
				if !have[m[1]+"."+m[2]] {
					out = append(out, Finding{fmt.Sprintf("%s:%d", name, n), fmt.Sprintf("the test %s.%s does not exist", m[1], m[2])})
				}
			}
		})
	}
	return out
}

var promise = regexp.MustCompile(`^## P[0-9]+ `)

// CheckPromises finds promises that no test holds: each is a heading "## P1 …"
// with at least one test below it.
func CheckPromises(name, text string) []Finding {
	var out []Finding
	open, openLine, held, count := "", 0, false, 0
	closeOne := func() {
		if open != "" && !held {
			out = append(out, Finding{fmt.Sprintf("%s:%d", name, openLine), fmt.Sprintf("the promise %q names no test that holds it", open)})
		}
		open, held = "", false
	}
	prose(text, func(n int, line string) {
		switch {
		case promise.MatchString(line):
			closeOne()
			open, openLine = strings.TrimPrefix(line, "## "), n
			count++
		case strings.HasPrefix(line, "## "):
			closeOne()
		case testName.MatchString(line):
			held = true
		}
	})
	closeOne()
	if count == 0 {
		out = append(out, Finding{name, "there is no promise in it"})
	}
	return out
}

// Section finds the part of a text that stands between two comments,
// "<!-- begin NAME -->" and "<!-- end NAME -->", and what stands before and
// after it.
func Section(text, name string) (before, part, after string, err error) {
	begin, end := "<!-- begin "+name+" -->\n", "<!-- end "+name+" -->"
	head, rest, ok := strings.Cut(text, begin)
	part, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return "", "", "", errors.New("no text between the comments for " + name)
	}
	return head + begin, part, end + tail, nil
}

// CodeTable is the table of spec/errors.md, made from cay.Codes.
func CodeTable(codes []cay.CodeInfo) string {
	var b bytes.Buffer
	fmt.Fprintln(&b, "| code | HTTP | again? | meaning |")
	fmt.Fprintln(&b, "|---|---|---|---|")
	for _, c := range codes {
		again := "no"
		if c.Retryable {
			again = "yes"
		}
		fmt.Fprintf(&b, "| `%s` | %d %s | %s | %s |\n", c.Code, c.Status, http.StatusText(c.Status), again, c.Meaning)
	}
	return b.String()
}

// PackageTable is the table of docs/architecture.md, made from Packages.
func PackageTable(packages []Package) string {
	var b bytes.Buffer
	fmt.Fprintln(&b, "| package | kind | what it is |")
	fmt.Fprintln(&b, "|---|---|---|")
	for _, p := range packages {
		name := p.Path
		if name == "." {
			name = "cay"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", name, p.Kind, p.Purpose)
	}
	return b.String()
}

// CheckCodes holds the constants of a file and the list of codes together: each
// constant of type Code is in the list once.
func CheckCodes(t *Tree, file string, codes []cay.CodeInfo) []Finding {
	var out []Finding
	declared := map[string]bool{}
	for _, d := range t.Dirs {
		for _, f := range d.Files {
			if f.Name != file {
				continue
			}
			ast.Inspect(f.AST, func(n ast.Node) bool {
				v, ok := n.(*ast.ValueSpec)
				if !ok || len(v.Values) != 1 {
					return true
				}
				typ, ok := v.Type.(*ast.Ident)
				lit, ok2 := v.Values[0].(*ast.BasicLit)
				if !ok || !ok2 || typ.Name != "Code" {
					return true
				}
				s, _ := strconv.Unquote(lit.Value) // the parser accepts only valid strings
				if declared[s] {
					out = append(out, Finding{file, fmt.Sprintf("two constants have the code %q", s)})
				}
				declared[s] = true
				if !slices.ContainsFunc(codes, func(c cay.CodeInfo) bool { return string(c.Code) == s }) {
					out = append(out, Finding{file, fmt.Sprintf("%s is not in the list Codes", v.Names[0].Name)})
				}
				return true
			})
		}
	}
	seen := map[cay.Code]bool{}
	for _, c := range codes {
		switch {
		case seen[c.Code]:
			out = append(out, Finding{file, fmt.Sprintf("the list Codes has %q twice", c.Code)})
		case !declared[string(c.Code)]:
			out = append(out, Finding{file, fmt.Sprintf("the list Codes has %q, which no constant names", c.Code)})
		case c.Meaning == "" || http.StatusText(c.Status) == "":
			out = append(out, Finding{file, fmt.Sprintf("the code %q needs a meaning and an HTTP status", c.Code)})
		}
		seen[c.Code] = true
	}
	return out
}
