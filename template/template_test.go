package template

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/templates"
)

func needErofs(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip(err)
	}
}

func writeFile(t *testing.T, content string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// keys lists the store's objects under a prefix.
func (r rig) keys(t *testing.T, prefix string) []blob.Key {
	t.Helper()
	objs, err := r.blobs.List(t.Context(), prefix)
	if err != nil {
		t.Fatal(err)
	}
	var out []blob.Key
	for _, o := range objs {
		out = append(out, o.Key)
	}
	return out
}

// invisible fails the test unless no build can be seen by anybody and nothing
// is left running or lying about.
func (r rig) invisible(t *testing.T) {
	t.Helper()
	if k := append(r.keys(t, "builds/"), r.keys(t, "candidates/")...); len(k) > 0 {
		t.Errorf("left in the store: %v", k)
	}
	if len(r.registry.refs) > 0 {
		t.Errorf("published: %v", r.registry.refs)
	}
	if len(r.node.live) > 0 {
		t.Errorf("left running: %v", r.node.live)
	}
	if es, err := os.ReadDir(r.Dir); err != nil || len(es) > 0 {
		t.Errorf("left in %s: %v, %v", r.Dir, es, err)
	}
}

func TestBuildFromImage(t *testing.T) {
	needErofs(t)
	r := newRig(t)
	m, err := r.BuildFromImage(t.Context(), testRecipe(t), writeFile(t, "an image"))
	if err != nil {
		t.Fatal(err)
	}
	if r.node.created != 1 || r.node.sawVisible || len(r.node.live) != 0 {
		t.Errorf("verification: %d sandboxes, visible before it %v, left %v", r.node.created, r.node.sawVisible, r.node.live)
	}
	got, err := Load(t.Context(), r.blobs, m.Build)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(m, got); diff != "" {
		t.Errorf("the stored manifest differs (-returned +stored):\n%s", diff)
	}
	if err := Verify(t.Context(), r.blobs, got); err != nil {
		t.Error(err)
	}
	want := cay.Manifest{Format: 1, Build: m.Build, Template: m.Template, Name: "base", CreatedAt: r.Now(), Arch: m.Arch, Runtime: "gvisor",
		RuntimeVersion: "v1", Layers: m.Layers, Init: InitPath, Envd: DigestBytes(r.Agent.Envd), EnvdVersion: "0.6.13",
		Defaults: cay.Defaults{User: "user"}, Resources: cay.Resources{CPUs: 1, MemoryMB: 512, DiskMB: 1024}}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Errorf("manifest (-want +got):\n%s", diff)
	}
	if m.Layers[0].Digest != DigestBytes([]byte("an image")) || len(m.Layers) != 2 {
		t.Errorf("layers: %+v", m.Layers)
	}
	if ref := r.registry.refs["base"]; ref.Build != m.Build || ref.Template != m.Template {
		t.Errorf("registry: %+v", ref)
	}
	if k := r.keys(t, "candidates/"); len(k) != 0 {
		t.Errorf("candidates left: %v", k)
	}

	// A second build keeps the template's ID and stores equal layers once.
	again, err := r.BuildFromImage(t.Context(), testRecipe(t), writeFile(t, "an image"))
	if err != nil {
		t.Fatal(err)
	}
	if again.Template != m.Template || again.Build == m.Build || !sameLayers(again.Layers, m.Layers) {
		t.Errorf("second build: %+v", again)
	}
	if k := r.keys(t, "layers/"); len(k) != 2 {
		t.Errorf("layers stored: %v", k)
	}
}

// Whatever step fails, nobody can see the build.
func TestFailedBuildIsInvisible(t *testing.T) {
	needErofs(t)
	guest := &cay.Error{Code: cay.CodeGuestProbe, Layer: cay.LayerGuest, Message: "no"}
	for _, c := range []struct {
		name string
		prep func(r rig)
		want cay.Code
	}{
		{"boot", func(r rig) {
			r.node.failWith = &cay.Error{Code: cay.CodeEnvdUnreachable, Layer: cay.LayerEnvd, Message: "no"}
		}, cay.CodeEnvdUnreachable},
		{"probe", func(r rig) { r.Prober = fakeProber{guest} }, cay.CodeGuestProbe},
		{"layer", func(r rig) { r.failPut("layers/") }, cay.CodeInternal},
		{"candidate", func(r rig) { r.failPut("candidates/") }, cay.CodeInternal},
		{"manifest", func(r rig) { r.failPut("builds/") }, cay.CodeInternal},
		{"publish", func(r rig) { r.registry.fail = errBroken }, cay.CodeInternal},
		{"agent", func(r rig) { r.Agent.Envd = []byte("#!/bin/sh\n") }, cay.CodeTemplateBuild},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			c.prep(r)
			_, err := r.BuildFromImage(t.Context(), testRecipe(t), writeFile(t, "an image"))
			if cay.CodeOf(err) != c.want {
				t.Fatalf("error %v, want %s", err, c.want)
			}
			if c.name == "probe" && guest.Detail["console"] != "last words" {
				t.Errorf("the guest's console is not in the error: %v", guest.Detail)
			}
			r.invisible(t)
		})
	}
}

func (r rig) failPut(prefix string) {
	r.blobs.Fail = func(op string, k blob.Key) error {
		if op == "put" && strings.HasPrefix(string(k), prefix) {
			return errBroken
		}
		return nil
	}
}

func TestRefresh(t *testing.T) {
	needErofs(t)
	r := newRig(t)
	first, err := r.BuildFromImage(t.Context(), testRecipe(t), writeFile(t, "an image"))
	if err != nil {
		t.Fatal(err)
	}
	same, changed, err := r.Refresh(t.Context(), "base")
	if err != nil || changed || same.Build != first.Build || r.node.created != 1 {
		t.Fatalf("Refresh with the same agent = %s, %v, %v", same.Build, changed, err)
	}
	r.Agent.Init = elf("other init")
	next, changed, err := r.Refresh(t.Context(), "base")
	if err != nil || !changed {
		t.Fatalf("Refresh = %v, %v", changed, err)
	}
	if next.Build == first.Build || next.Template != first.Template || next.Layers[0] != first.Layers[0] || next.Layers[1] == first.Layers[1] {
		t.Errorf("refreshed %+v\nfrom %+v", next, first)
	}
	if r.node.created != 2 || r.registry.refs["base"].Build != next.Build {
		t.Errorf("%d verifications, current %v", r.node.created, r.registry.refs)
	}
	// A failed refresh leaves the current build in force.
	r.Agent.Envd = elf("other envd")
	r.Prober = fakeProber{errBroken}
	if _, _, err := r.Refresh(t.Context(), "base"); !errors.Is(err, errBroken) {
		t.Fatalf("Refresh = %v", err)
	}
	if r.registry.refs["base"].Build != next.Build {
		t.Errorf("current %v", r.registry.refs)
	}
	if _, _, err := r.Refresh(t.Context(), "unknown"); cay.CodeOf(err) != cay.CodeTemplateNotFound {
		t.Errorf("Refresh of an unknown template = %v", err)
	}
}

// Equal binaries give equal layers, whenever and wherever they are made.
func TestAgentLayerIsDeterministic(t *testing.T) {
	needErofs(t)
	a := Agent{Init: elf("i"), Envd: elf("e")}
	var digests []cay.Digest
	for range 2 {
		dir := t.TempDir()
		file := filepath.Join(dir, "agent.erofs")
		if err := makeAgentLayer(t.Context(), a, dir, file); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, DigestBytes(b))
	}
	if digests[0] != digests[1] {
		t.Errorf("two images of the same agent: %v", digests)
	}
}

// TestAgentSaysItsDigest: beside the daemon, in the words of sha256sum(1), is
// what the manifest has of it.
func TestAgentSaysItsDigest(t *testing.T) {
	needErofs(t)
	a := Agent{Init: elf("i"), Envd: elf("e")}
	dir := t.TempDir()
	if err := makeAgentLayer(t.Context(), a, dir, filepath.Join(dir, "agent.erofs")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sha256sum", "-c", filepath.Base(EnvdSumPath))
	cmd.Dir = filepath.Join(dir, "agent", filepath.Dir(EnvdSumPath))
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "envd: OK\n" {
		t.Errorf("%q, %v", out, err)
	}
	text, err := os.ReadFile(filepath.Join(cmd.Dir, cmd.Args[2]))
	if err != nil || "sha256:"+string(text[:64]) != string(DigestBytes(a.Envd)) {
		t.Errorf("%q, %v; the manifest says %s", text, err, DigestBytes(a.Envd))
	}
}

func TestLoadErrors(t *testing.T) {
	needErofs(t)
	for _, c := range []struct {
		name string
		prep func(t *testing.T, r rig, m *cay.Manifest)
		want cay.Code
		part string
	}{
		{"manifest missing", func(t *testing.T, r rig, m *cay.Manifest) { r.delete(t, ManifestKey(m.Build)) }, cay.CodeTemplateIncomplete, "manifest"},
		{"system missing", func(t *testing.T, r rig, m *cay.Manifest) { r.delete(t, LayerKey(m.Layers[0].Digest)) }, cay.CodeTemplateIncomplete, "layer 1 of 2"},
		{"agent missing", func(t *testing.T, r rig, m *cay.Manifest) { r.delete(t, LayerKey(m.Layers[1].Digest)) }, cay.CodeTemplateIncomplete, "layer 2 of 2"},
		{"layer cut", func(t *testing.T, r rig, m *cay.Manifest) { r.put(t, LayerKey(m.Layers[0].Digest), "an") }, cay.CodeObjectCorrupt, "layer 1 of 2"},
		{"manifest empty", func(t *testing.T, r rig, m *cay.Manifest) { r.put(t, ManifestKey(m.Build), "") }, cay.CodeTemplateInvalid, "manifest"},
		{"manifest of another build", func(t *testing.T, r rig, m *cay.Manifest) {
			m.Build = "00000000-0000-0000-0000-000000000000"
			m2 := *m
			m2.Build = "11111111-1111-1111-1111-111111111111"
			if err := r.putManifest(t.Context(), ManifestKey(m.Build), m2); err != nil {
				t.Fatal(err)
			}
		}, cay.CodeTemplateInvalid, "manifest"},
		{"bad ID", func(t *testing.T, r rig, m *cay.Manifest) { m.Build = "../x" }, cay.CodeTemplateNotFound, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			m, err := r.BuildFromImage(t.Context(), testRecipe(t), writeFile(t, "an image"))
			if err != nil {
				t.Fatal(err)
			}
			c.prep(t, r, &m)
			_, err = Load(t.Context(), r.blobs, m.Build)
			var e *cay.Error
			if !errors.As(err, &e) || e.Code != c.want || e.Detail["part"] != c.part || e.Fix == "" {
				t.Fatalf("Load = %v, want %s of %q", err, c.want, c.part)
			}
			if _, err2 := LoadCandidate(t.Context(), r.blobs, m.Build); cay.CodeOf(err2) != c.want {
				t.Errorf("LoadCandidate = %v", err2)
			}
		})
	}
}

func (r rig) delete(t *testing.T, k blob.Key) {
	t.Helper()
	if err := r.blobs.Delete(t.Context(), k); err != nil {
		t.Fatal(err)
	}
}

func (r rig) put(t *testing.T, k blob.Key, content string) {
	t.Helper()
	if _, err := r.blobs.Put(t.Context(), k, strings.NewReader(content)); err != nil {
		t.Fatal(err)
	}
}

// Every flipped bit of a layer is found.
func TestVerifyFindsFlippedBits(t *testing.T) {
	needErofs(t)
	r := newRig(t)
	m, err := r.BuildFromImage(t.Context(), testRecipe(t), writeFile(t, strings.Repeat("an image ", 1000)))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		k := LayerKey(m.Layers[i%2].Digest)
		r.blobs.Corrupt(k, i*43)
		if err := Verify(t.Context(), r.blobs, m); cay.CodeOf(err) != cay.CodeObjectCorrupt {
			t.Fatalf("flip %d: Verify = %v", i, err)
		}
		r.blobs.Corrupt(k, i*43)
	}
	if err := Verify(t.Context(), r.blobs, m); err != nil {
		t.Fatal(err)
	}
}

func TestCleanRemovesOldLeftovers(t *testing.T) {
	needErofs(t)
	r := newRig(t)
	r.put(t, candidateKey("00000000-0000-0000-0000-000000000000"), "{}")
	old := filepath.Join(r.Dir, workPrefix+"killed")
	if err := os.MkdirAll(filepath.Join(old, "root/dev"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(r.keys(t, "candidates/")) == 1 { // the store's clock is real and later than the rig's
		r.Now = func() time.Time { return time.Now().Add(2 * staleAfter) }
	}
	if err := r.clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.invisible(t)
}

func TestReadRecipe(t *testing.T) {
	if r, err := ReadRecipe(templates.Files, "base"); err != nil || r.Name != "base" || len(r.packages) < 20 {
		t.Fatalf("the stock recipe: %v, %d packages", err, len(r.packages))
	}
	good := func() fstest.MapFS {
		return fstest.MapFS{"r/recipe.json": {Data: []byte(recipeJSON)}, "r/p": {Data: []byte("bash\n# c\n\npython3 # why\n")},
			"r/s": {Data: []byte("#!/bin/sh\n")}}
	}
	for _, c := range []struct {
		name string
		edit func(f fstest.MapFS)
		want string
	}{
		{"unknown field", func(f fstest.MapFS) { f["r/recipe.json"].Data = []byte(`{"nmae":"x"}`) }, "nmae"},
		{"bad name", func(f fstest.MapFS) {
			f["r/recipe.json"].Data = bytes.Replace(f["r/recipe.json"].Data, []byte(`"base"`), []byte(`"A b"`), 1)
		}, "name"},
		{"no packages file", func(f fstest.MapFS) { delete(f, "r/p") }, "r/p"},
		{"option as package", func(f fstest.MapFS) { f["r/p"].Data = []byte("--setup-hook=x\n") }, "setup-hook"},
		{"mangled first line", func(f fstest.MapFS) { f["r/s"].Data = []byte("#\\!/bin/sh\n") }, "#!/bin/sh"},
		{"carriage returns", func(f fstest.MapFS) { f["r/s"].Data = []byte("#!/bin/sh\nx\r\n") }, "carriage"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := good()
			c.edit(f)
			_, err := ReadRecipe(f, "r")
			if cay.CodeOf(err) != cay.CodeTemplateInvalid || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("ReadRecipe = %v, want %q in it", err, c.want)
			}
		})
	}
	r, err := ReadRecipe(good(), "r")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"bash", "python3"}, r.packages); diff != "" {
		t.Error(diff)
	}
}

// fakeTool puts a shell script into PATH under the name of a program.
func fakeTool(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// What mmdebstrap prints, cut down; the directory is the argument after the
// suite.
const fakeBootstrap = `
for a in "$@"; do if [ "$prev" = bookworm ]; then dir=$a; fi; prev=$a; done
echo "I: running apt-get update..."
echo "I: downloading packages with apt..."
echo "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded."
echo "Get:1 http://m bookworm/main amd64 libc6 amd64 2 [1 kB]"
echo "Unpacking libc6:amd64 (2) ..."; echo "Setting up libc6:amd64 (2) ..."
echo "I: installing remaining packages inside the chroot..."
echo "0 upgraded, 3 newly installed, 0 to remove and 0 not upgraded."
echo "Setting up a ..."; echo "Setting up b ..."; echo "Setting up c ..."
echo "I: running special hook: copy-in"
mkdir -p "$dir/etc"; echo hi > "$dir/etc/motd"
`

func TestBuildFromPackages(t *testing.T) {
	needErofs(t)
	fakeTool(t, "mmdebstrap", fakeBootstrap)
	r := newRig(t)
	tick := r.Now()
	r.Now = func() time.Time { tick = tick.Add(150 * time.Millisecond); return tick }
	m, err := r.Build(t.Context(), testRecipe(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Load(t.Context(), r.blobs, m.Build); err != nil {
		t.Fatal(err)
	}
	if es, err := os.ReadDir(r.Dir); err != nil || len(es) > 0 {
		t.Errorf("left in %s: %v, %v", r.Dir, es, err)
	}
	var ended []int
	counted := false
	for _, e := range *r.events {
		if e.End {
			ended = append(ended, e.Step)
		}
		counted = counted || e.Total == 3 && e.Done > 0
	}
	if diff := cmp.Diff([]int{1, 2, 3, 4, 5, 6, 7}, ended); diff != "" || !counted {
		t.Errorf("steps ended (-want +got):\n%s counted %v", diff, counted)
	}
}

func TestBuildErrors(t *testing.T) {
	for _, c := range []struct{ name, script, message, fix string }{
		{"no network", `echo "Err:1 http://deb.debian.org bookworm InRelease"; echo "  Could not resolve 'deb.debian.org'"; exit 1`, "Err:1", "name servers"},
		{"unknown package", `echo "E: Unable to locate package nosuch"; exit 100`, "nosuch", "recipe's list"},
		{"disk full", `echo "E: Write error - write (28: No space left on device)"; exit 1`, "No space", "free space"},
		{"killed", `kill -9 $$`, "killed", "output"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fakeTool(t, "mmdebstrap", c.script)
			r := newRig(t)
			_, err := r.Build(t.Context(), testRecipe(t))
			var e *cay.Error
			if !errors.As(err, &e) || !strings.Contains(e.Message, c.message) || !strings.Contains(e.Fix, c.fix) {
				t.Fatalf("Build = %v", err)
			}
			r.invisible(t)
		})
	}
	t.Run("missing program", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		r := newRig(t)
		_, err := r.Build(t.Context(), testRecipe(t))
		if cay.CodeOf(err) != cay.CodeTemplateBuild || !strings.Contains(err.Error(), "apt-get install mmdebstrap") {
			t.Fatalf("Build = %v", err)
		}
		r.invisible(t)
	})
	t.Run("cancelled", func(t *testing.T) {
		fakeTool(t, "mmdebstrap", `echo "I: running apt-get update..."; exec cat /dev/zero > /dev/null`)
		r := newRig(t)
		ctx, cancel := context.WithCancel(t.Context())
		r.Progress = func(e Event) {
			if e.Line != "" {
				cancel()
			}
		}
		if _, err := r.Build(ctx, testRecipe(t)); !errors.Is(err, context.Canceled) {
			t.Fatalf("Build = %v", err)
		}
		r.invisible(t)
	})
}

func TestHostSources(t *testing.T) {
	r := testRecipe(t)
	r.Mirrors = []string{"http://m/debian", "http://m/debian-security"}
	for _, c := range []struct {
		name, targets string
		want          []string
	}{
		{"debian", `http://mirror.corp/debian/|bookworm|main|Debian
http://mirror.corp/debian/|bookworm-updates|main|Debian
http://mirror.corp/security/|bookworm-security|main|Debian
https://apt.example.com/|bookworm|main|Example
https://download.example.com/linux/debian/|bookworm|stable|Other
`, []string{"deb http://mirror.corp/debian/ bookworm main", "deb http://mirror.corp/debian/ bookworm-updates main",
			"deb http://mirror.corp/security/ bookworm-security main"}},
		{"no lists yet", "http://deb.debian.org/debian/|bookworm|main|$(ORIGIN)\nhttps://apt.example.com/|bookworm|main|$(ORIGIN)\n",
			[]string{"deb http://deb.debian.org/debian/ bookworm main"}},
		{"another release", "http://archive.ubuntu.com/ubuntu/|noble|main|Ubuntu\n", nil},
		{"only updates", "http://m/|bookworm-updates|main|Debian\n", nil},
		{"nonsense", "x\n|||\n", nil},
	} {
		if diff := cmp.Diff(c.want, hostSources(c.targets, r)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
	got := pickAptOptions("APT::Architecture \"amd64\";\nAcquire::http::Proxy \"http://p:3128\";\nAcquire::Check-Valid-Until \"false\";\n")
	if diff := cmp.Diff([]string{`Acquire::http::Proxy "http://p:3128"`, `Acquire::Check-Valid-Until "false"`}, got); diff != "" {
		t.Error(diff)
	}
}

func TestPrinter(t *testing.T) {
	events := []Event{
		{Step: 1, Steps: 7, Title: "reading"},
		{Step: 1, Steps: 7, Line: "noise"},
		{Step: 1, Steps: 7, Title: "reading", Elapsed: 2 * time.Second, End: true},
		{Step: 3, Steps: 7, Title: "installing"},
		{Step: 3, Steps: 7, Title: "installing", Done: 14, Total: 505, Unit: "packages", Elapsed: 4 * time.Second},
		{Step: 3, Steps: 7, Title: "installing", Done: 142, Total: 505, Unit: "packages", Elapsed: 41 * time.Second},
		{Step: 3, Steps: 7, Title: "installing", Done: 505, Total: 505, Unit: "packages", Elapsed: 60 * time.Second, End: true},
	}
	var plain, tty strings.Builder
	a, b := Printer(&plain, false, false), Printer(&tty, true, false)
	for _, e := range events {
		a(e)
		b(e)
	}
	want := `[1/7] reading
[1/7] reading: 2.0 s
[3/7] installing
[3/7] installing: 142 of 505 packages, 41.0 s
[3/7] installing: 505 of 505 packages, 60.0 s
`
	if diff := cmp.Diff(want, plain.String()); diff != "" {
		t.Errorf("plain (-want +got):\n%s", diff)
	}
	if got := strings.Count(tty.String(), "\n"); got != 2 {
		t.Errorf("on a terminal %d lines, want one per step:\n%q", got, tty.String())
	}
}
