package lint_test

import (
	"cmp"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/lint"
)

var update = flag.Bool("update", false, "rewrite the tables that are made from the source")

// root is the module's root.
const root = "../.."

var load = sync.OnceValues(func() (*lint.Tree, error) { return lint.Load(os.DirFS(root)) })

func tree(t *testing.T) *lint.Tree {
	t.Helper()
	tr, err := load()
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func report(t *testing.T, found []lint.Finding) {
	t.Helper()
	slices.SortFunc(found, func(a, b lint.Finding) int { return cmp.Compare(a.String(), b.String()) })
	for _, f := range found {
		t.Error(f)
	}
}

// stockTemplates are the directories of templates/.
func stockTemplates(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, "templates"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, e.Name())
		}
	}
	return out
}

func TestRules(t *testing.T) {
	report(t, lint.Rules{Packages: lint.Packages, Homes: lint.HeavyHomes, LargeFiles: lint.LargeFiles, WideTypes: lint.WideTypes,
		Ambient: lint.Ambient, HostPaths: lint.HostPaths, Templates: stockTemplates(t)}.Check(tree(t)))
}

func TestDocuments(t *testing.T) {
	docs, err := lint.Markdown(os.DirFS(root))
	if err != nil {
		t.Fatal(err)
	}
	report(t, slices.Concat(
		lint.CheckLinks(os.DirFS(root), docs),
		lint.CheckTests(tree(t), docs),
		lint.CheckComments(os.DirFS(root), tree(t)),
		lint.CheckPromises("docs/promises.md", docs["docs/promises.md"])))
}

// section compares the part of a document that is made from the source, or
// rewrites it.
func section(t *testing.T, file, name, want string) {
	t.Helper()
	path := filepath.Join(root, file)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, got, after, err := lint.Section(string(b), name)
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if got == want {
		return
	}
	if *update {
		if err := os.WriteFile(path, []byte(before+want+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("%s is not what the source says (go test ./internal/lint -update rewrites it):\n%s", file, gocmp.Diff(got, want))
}

func TestErrorCodes(t *testing.T) {
	report(t, lint.CheckCodes(tree(t), "error.go", cay.Codes))
	section(t, "spec/errors.md", "codes", lint.CodeTable(cay.Codes))
}

func TestPackageTable(t *testing.T) {
	section(t, "docs/architecture.md", "packages", lint.PackageTable(lint.Packages))
}

// TestEnvdDependencies holds the packages that are linked into every guest's
// daemon: a new one shows in the diff of cmd/envd/deps.txt.
func TestEnvdDependencies(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./cmd/envd")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64", "GOOS=linux")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("listing the dependencies of cmd/envd: %v", err)
	}
	lines := strings.Fields(string(out))
	slices.Sort(lines)
	got := strings.Join(lines, "\n") + "\n"
	file := filepath.Join(root, "cmd/envd/deps.txt")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(string(want), got); diff != "" {
		t.Errorf("the dependencies of cmd/envd changed; if that is meant, go test ./internal/lint -update:\n%s", diff)
	}
}

// TestIgnored: the source tree of a developer has more in it than the
// repository; none of it is looked at.
func TestIgnored(t *testing.T) {
	for _, d := range tree(t).Dirs {
		for _, part := range strings.Split(d.Path, "/") {
			if part == "testdata" || part == "node_modules" || strings.HasPrefix(part, ".") && part != "." {
				t.Errorf("%s was read", d.Path)
			}
		}
	}
	if _, err := fs.Stat(os.DirFS(root), "go.mod"); err != nil {
		t.Errorf("the tests read another directory than the module's root: %v", err)
	}
}
