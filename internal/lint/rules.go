package lint

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Finding is a place where a rule is broken.
type Finding struct {
	Where string // file, file:line or package
	Text  string // a sentence
}

// String returns the finding on one line.
func (f Finding) String() string { return f.Where + ": " + f.Text }

// Rules are the tables that the checks compare a tree with.
type Rules struct {
	Packages   []Package
	Homes      []Home
	LargeFiles []Exception
	WideTypes  []Exception
	Ambient    []Exception
	HostPaths  []Exception
	Templates  []string // names of the stock templates
}

// Check returns every finding in the tree.
func (r Rules) Check(t *Tree) []Finding {
	c := &checker{Rules: r, tree: t, kinds: map[string]Kind{}, used: map[Exception]bool{}}
	for _, p := range r.Packages {
		c.kinds[p.Path] = p.Kind
	}
	c.table()
	for _, d := range t.Dirs {
		c.names(d)
		c.docs(d)
		c.methods(d)
		for _, f := range d.Files {
			c.size(f)
			if f.Test {
				continue
			}
			c.imports(d, f)
			c.ambient(d, f)
			c.literals(d, f)
		}
	}
	c.unused()
	slices.SortFunc(c.out, func(a, b Finding) int {
		return cmp.Or(strings.Compare(a.Where, b.Where), strings.Compare(a.Text, b.Text))
	})
	return c.out
}

type checker struct {
	Rules
	tree  *Tree
	kinds map[string]Kind
	used  map[Exception]bool
	out   []Finding
}

func (c *checker) add(where, format string, args ...any) {
	c.out = append(c.out, Finding{where, fmt.Sprintf(format, args...)})
}

func (c *checker) at(pos token.Pos) string {
	p := c.tree.Fset.Position(pos)
	return p.Filename + ":" + strconv.Itoa(p.Line)
}

// excepted reports whether a table permits what in file.
func (c *checker) excepted(table []Exception, file, what string) bool {
	for _, e := range table {
		if e.File == file && e.What == what {
			c.used[e] = true
			return true
		}
	}
	return false
}

// unused keeps the tables of exceptions short.
func (c *checker) unused() {
	for _, e := range slices.Concat(c.LargeFiles, c.WideTypes, c.Ambient, c.HostPaths) {
		if !c.used[e] {
			c.add(e.File, "the exception for %q is needed no more: remove it from internal/lint/table.go", e.What)
		}
		if e.Reason == "" {
			c.add(e.File, "the exception for %q has no reason", e.What)
		}
	}
}

// table: every package has a row, every row a package.
func (c *checker) table() {
	there := map[string]bool{}
	for _, d := range c.tree.Dirs {
		there[d.Path] = true
		if _, ok := c.kinds[d.Path]; !ok {
			c.add(d.Path, "the package is not in the table of internal/lint/table.go: enter it with its kind and purpose")
		}
	}
	seen := map[string]bool{}
	for _, p := range c.Packages {
		switch {
		case seen[p.Path]:
			c.add(p.Path, "the package is in the table of internal/lint/table.go twice")
		case !there[p.Path]:
			c.add(p.Path, "the table of internal/lint/table.go names a package that does not exist")
		case p.Purpose == "" || strings.Contains(p.Purpose, "\n"):
			c.add(p.Path, "the table of internal/lint/table.go needs the package's purpose, in one line")
		case (p.Kind == Generated) != strings.HasPrefix(p.Path, "internal/gen/"):
			c.add(p.Path, "generated code lives in internal/gen, and nothing else does")
		case (p.Kind == Command) != strings.HasPrefix(p.Path, "cmd/"):
			c.add(p.Path, "commands live in cmd, and nothing else does")
		}
		seen[p.Path] = true
	}
}

// imports: the layers, and the homes of heavy libraries.
func (c *checker) imports(d *Dir, f *File) {
	kind, ok := c.kinds[d.Path]
	if !ok {
		return // said already
	}
	for i, imp := range f.Imports() {
		where := c.at(f.AST.Imports[i].Pos())
		if why := c.refuse(d.Path, kind, imp); why != "" {
			c.add(where, "%s: it imports %s", why, imp)
		}
		for _, h := range c.Homes {
			if strings.HasPrefix(imp, h.Prefix) && !slices.Contains(h.Homes, d.Path) {
				c.add(where, "only %s may import %s…: it imports %s", strings.Join(h.Homes, " and "), h.Prefix, imp)
			}
		}
	}
}

// refuse returns the rule that forbids a package to import another, or "".
func (c *checker) refuse(from string, kind Kind, imp string) string {
	to, ours := inModule(imp)
	if !ours {
		switch {
		case isStandard(imp):
			return ""
		case kind == Root:
			return "the root imports the standard library only"
		case kind == Contract:
			return "a contract imports the root only"
		}
		return ""
	}
	target, known := c.kinds[to]
	if !known {
		return "every import must be in the table of internal/lint/table.go"
	}
	parent := path.Dir(from)
	may := func(kinds ...Kind) bool { return slices.Contains(kinds, target) }
	switch kind {
	case Root:
		return "the root imports the standard library only"
	case Contract:
		if !may(Root) {
			return "a contract imports the root only"
		}
	case Suite:
		if !may(Root, Internal) && to != parent {
			return "a contract's test package imports the root, its contract and internal tools"
		}
	case Adapter:
		if !may(Root, Mechanism, Internal, Generated) && to != parent {
			return "an adapter imports the root, its contract, mechanisms and internal tools, never another adapter or a service"
		}
	case Service:
		if !may(Root, Contract, Mechanism, Internal, Generated) {
			return "a service imports contracts and mechanisms, never an adapter or another service"
		}
	case Mechanism:
		if !may(Root, Internal, Generated) {
			return "a mechanism imports the root and internal tools"
		}
	case Guest:
		if !may(Generated) {
			return "envd imports internal/gen and nothing else of ours"
		}
	case Generated:
		if !may(Root, Generated) {
			return "generated code imports generated code only"
		}
	case Internal:
		if !may(Root, Internal, Generated) {
			return "an internal tool imports the root and internal tools"
		}
	case Data:
		return "a package of files imports nothing of ours"
	case Command:
		if may(Test, Suite, Command) {
			return "a command imports no tests"
		}
	case Test:
		if may(Command) {
			return "a command is started, not imported"
		}
	default:
		return fmt.Sprintf("the kind %q of internal/lint/table.go has no rule", kind)
	}
	return ""
}

// names: what packages are called, and how deep they lie.
func (c *checker) names(d *Dir) {
	if c.kinds[d.Path] == Generated {
		return
	}
	elems := strings.Split(d.Path, "/")
	if len(elems) > MaxDepth {
		c.add(d.Path, "a package lies at most %d directories deep", MaxDepth)
	}
	for _, name := range slices.Compact([]string{elems[len(elems)-1], d.Name()}) {
		if slices.Contains(RefusedNames, name) {
			c.add(d.Path, "the name %q says nothing: name the package after what it does", name)
		}
	}
}

// docs: one file of each package has its doc comment.
func (c *checker) docs(d *Dir) {
	if c.kinds[d.Path] == Generated {
		return
	}
	testsOnly := !slices.ContainsFunc(d.Files, func(f *File) bool { return !f.Test })
	var in []string
	for _, f := range d.Files {
		if f.AST.Doc == nil || f.Test && !testsOnly {
			continue
		}
		in = append(in, f.Name)
		want := "Package " + d.Name() + " "
		if d.Name() == "main" {
			want = "Command " + path.Base(d.Path) + " "
		}
		if !strings.HasPrefix(f.AST.Doc.Text(), want) {
			c.add(f.Name, "the package's doc comment must begin with %q", want)
		}
	}
	switch {
	case len(in) == 0:
		c.add(d.Path, "the package has no doc comment")
	case len(in) > 1:
		c.add(d.Path, "the package has %d doc comments, in %s", len(in), strings.Join(in, ", "))
	}
}

// size: a file can be read in one go.
func (c *checker) size(f *File) {
	if ast.IsGenerated(f.AST) {
		if !strings.HasPrefix(f.Name, "internal/gen/") {
			c.add(f.Name, "generated code lives in internal/gen, and nothing else does")
		}
		return
	}
	if strings.HasPrefix(f.Name, "internal/gen/") {
		c.add(f.Name, "internal/gen holds generated code, and nothing by hand")
	}
	if f.Lines > MaxLines && !c.excepted(c.LargeFiles, f.Name, "lines") {
		c.add(f.Name, "the file has %d lines, more than %d: split it", f.Lines, MaxLines)
	}
}

// methods: a type with very many methods is several types.
func (c *checker) methods(d *Dir) {
	if c.kinds[d.Path] == Generated {
		return
	}
	count := map[string]int{}
	file := map[string]string{}
	for _, f := range d.Files {
		for _, decl := range f.AST.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || f.Test || fn.Recv == nil || !fn.Name.IsExported() {
				continue
			}
			name := receiver(fn.Recv.List[0].Type)
			count[name]++
			file[name] = cmp.Or(file[name], f.Name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(count)) {
		if count[name] > MaxMethods && !c.excepted(c.WideTypes, file[name], name) {
			c.add(d.Path, "the type %s has %d exported methods, more than %d", name, count[name], MaxMethods)
		}
	}
}

func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.IndexListExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}

// ambient: only commands read flags and the environment, and nothing registers
// itself.
func (c *checker) ambient(d *Dir, f *File) {
	switch c.kinds[d.Path] {
	case Command, Generated, Test, Suite:
		return
	}
	if slices.Contains(f.Imports(), "flag") && !c.excepted(c.Ambient, f.Name, "flag") {
		c.add(f.Name, "only cmd reads flags: take the value as a parameter")
	}
	ast.Inspect(f.AST, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			if n.Recv == nil && n.Name.Name == "init" && !c.excepted(c.Ambient, f.Name, "init") {
				c.add(c.at(n.Pos()), "no init functions: cmd wires")
			}
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if !ok || x.Name != "os" {
				return true
			}
			switch n.Sel.Name {
			case "Getenv", "LookupEnv", "Environ", "ExpandEnv":
				what := "os." + n.Sel.Name
				if !c.excepted(c.Ambient, f.Name, what) {
					c.add(c.at(n.Pos()), "only cmd reads the environment: take the value as a parameter instead of calling %s", what)
				}
			}
		}
		return true
	})
}

var (
	hostPath = regexp.MustCompile(`(?:^|[=:])(/(?:bin|boot|etc|home|lib|lib64|media|mnt|opt|root|run|sbin|srv|tmp|usr|var)/[^\s"']*)`)
	uuidText = regexp.MustCompile(`(?i)\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b`)
)

// literals: paths of a host, UUIDs and names of templates come from outside.
func (c *checker) literals(d *Dir, f *File) {
	switch c.kinds[d.Path] {
	case Command, Generated, Test, Suite, Data:
		return
	}
	if strings.HasPrefix(f.Name, "internal/lint/") {
		return // the tables name what they permit
	}
	ast.Inspect(f.AST, func(n ast.Node) bool {
		lit, ok := n.(*ast.BasicLit)
		if !ok || lit.Kind != token.STRING {
			return true
		}
		text, err := strconv.Unquote(lit.Value)
		if err != nil {
			return true
		}
		if m := hostPath.FindStringSubmatch(text); m != nil && !c.excepted(c.HostPaths, f.Name, m[1]) {
			c.add(c.at(lit.Pos()), "no path of a host is written into the source: take %s as a parameter", m[1])
		}
		if m := uuidText.FindString(text); m != "" && !c.excepted(c.HostPaths, f.Name, m) {
			c.add(c.at(lit.Pos()), "no UUID is written into the source: %s", m)
		}
		if slices.Contains(c.Templates, text) && !c.excepted(c.HostPaths, f.Name, text) {
			c.add(c.at(lit.Pos()), "no template's name is written into the source: take %q as a parameter", text)
		}
		return true
	})
}
