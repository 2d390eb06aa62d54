// Package template turns a recipe into a build that sandboxes can be made of:
// recipe → layers → a boot that proves them → manifest.
//
// A build is complete and verified, or invisible. Its layers are stored first,
// under their digests. Its manifest is first stored as a candidate, which only
// a node that is told the build's ID looks for; the node boots it, and a
// [Prober] runs a command in it and moves a file there and back. Only then the
// manifest is stored under builds/, last and in one atomic step, and the
// [Registry] is told. A crash before that leaves objects that nothing refers
// to; a crash between the two leaves a build that is whole, and that no name
// refers to.
package template

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
)

// Registry is what the builder needs of the record of templates.
type Registry interface {
	// Current returns the template of a name and the build that its name
	// stands for. An unknown name is cay.CodeTemplateNotFound.
	Current(ctx context.Context, name string) (Ref, error)
	// Publish makes a finished build the one that its template's name stands
	// for, making the template if it is new. The last call wins.
	Publish(ctx context.Context, m cay.Manifest) error
}

// Ref names a template's build.
type Ref struct {
	Template cay.TemplateID
	Build    cay.BuildID
}

// Prober proves that a sandbox works: a command runs in it and a file makes
// the way in and out unchanged.
type Prober interface {
	// Probe uses the sandbox as a client would; token is its access token. The
	// error is cay.CodeEnvdUnreachable or cay.CodeGuestProbe.
	Probe(ctx context.Context, s cay.NodeSandbox, token cay.Secret) error
}

// Builder makes builds. Set the fields, then call its methods; builds of one
// Builder run one after the other.
type Builder struct {
	Blobs    blob.Store
	Node     cay.Node
	Registry Registry
	Prober   Prober
	Agent    Agent
	// Dir is for work in progress; a build of the base template needs 2 GiB.
	Dir string
	// Team owns the sandboxes that verify builds.
	Team cay.TeamID
	// Progress receives the news of a build, one at a time; nil is nobody.
	Progress func(Event)
	Log      *slog.Logger
	Now      func() time.Time

	mu sync.Mutex
}

func (b *Builder) now() time.Time {
	if b.Now == nil {
		return time.Now()
	}
	return b.Now()
}

func (b *Builder) log() *slog.Logger {
	if b.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return b.Log
}

func (b *Builder) reporter() *reporter {
	return &reporter{to: b.Progress, now: b.now, steps: buildSteps}
}

// needFree is the room a build from packages needs, in bytes: the system, its
// image, and the stored copy of the image.
const needFree = 2 << 30

// Build makes, verifies and publishes a new build of the recipe.
func (b *Builder) Build(ctx context.Context, r Recipe) (cay.Manifest, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.Agent.check(); err != nil {
		return cay.Manifest{}, err
	}
	if err := checkRoom(b.Dir, needFree); err != nil {
		return cay.Manifest{}, err
	}
	work, done, err := b.workDir(ctx)
	if err != nil {
		return cay.Manifest{}, err
	}
	defer done()
	rep := b.reporter()
	rep.begin(stepLists)
	root := filepath.Join(work, "root")
	if err := b.bootstrap(ctx, r, root, rep); err != nil {
		return cay.Manifest{}, err
	}
	rep.begin(stepImage)
	id := uuid.New()
	file := filepath.Join(work, "system.erofs")
	if err := makeImage(ctx, root, file, imageOptions{id: id, epoch: b.now().Unix()}); err != nil {
		return cay.Manifest{}, err
	}
	return b.fromImage(ctx, r, work, file, rep)
}

// BuildFromImage is [Builder.Build] with the system's EROFS image made
// elsewhere.
func (b *Builder) BuildFromImage(ctx context.Context, r Recipe, image string) (cay.Manifest, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	work, done, err := b.workDir(ctx)
	if err != nil {
		return cay.Manifest{}, err
	}
	defer done()
	rep := b.reporter()
	rep.begin(stepImage)
	return b.fromImage(ctx, r, work, image, rep)
}

func (b *Builder) fromImage(ctx context.Context, r Recipe, work, image string, rep *reporter) (cay.Manifest, error) {
	system, err := b.storeLayer(ctx, image)
	if err != nil {
		return cay.Manifest{}, err
	}
	rep.begin(stepAgent)
	agent, err := b.agentLayer(ctx, work)
	if err != nil {
		return cay.Manifest{}, err
	}
	m := b.manifest([]cay.ImageLayer{system, agent})
	m.Name, m.Defaults, m.Resources = r.Name, r.Defaults, r.Resources
	m.Template = cay.NewTemplateID()
	ref, err := b.Registry.Current(ctx, r.Name)
	switch {
	case err == nil:
		m.Template = ref.Template
	case cay.CodeOf(err) != cay.CodeTemplateNotFound:
		return cay.Manifest{}, fmt.Errorf("look up the template %s: %w", r.Name, err)
	}
	return b.finish(ctx, m, rep)
}

// Refresh gives the template's current build this program's agent, in a new
// build with the same system, verified again. It reports false, with the
// current manifest, when the agent is the same already.
func (b *Builder) Refresh(ctx context.Context, name string) (cay.Manifest, bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ref, err := b.Registry.Current(ctx, name)
	if err != nil {
		return cay.Manifest{}, false, err
	}
	cur, err := Load(ctx, b.Blobs, ref.Build)
	if err != nil {
		return cay.Manifest{}, false, err
	}
	work, done, err := b.workDir(ctx)
	if err != nil {
		return cay.Manifest{}, false, err
	}
	defer done()
	rep := &reporter{to: b.Progress, now: b.now, steps: buildSteps}
	agent, err := b.agentLayer(ctx, work)
	if err != nil {
		return cay.Manifest{}, false, err
	}
	layers := append(cur.Layers[:len(cur.Layers)-1:len(cur.Layers)-1], agent)
	if sameLayers(layers, cur.Layers) && cur.EnvdVersion == b.Agent.EnvdVersion {
		return cur, false, nil
	}
	rep.begin(stepAgent)
	m := b.manifest(layers)
	m.Template, m.Name, m.Defaults, m.Resources = cur.Template, cur.Name, cur.Defaults, cur.Resources
	m, err = b.finish(ctx, m, rep)
	return m, err == nil, err
}

// manifest begins the manifest of a new build.
func (b *Builder) manifest(layers []cay.ImageLayer) cay.Manifest {
	return cay.Manifest{Format: cay.ManifestFormat, Build: cay.BuildID(uuid.NewString()), CreatedAt: b.now().UTC().Truncate(time.Second),
		Arch: runtime.GOARCH, Layers: layers, Init: InitPath, Envd: DigestBytes(b.Agent.Envd), EnvdVersion: b.Agent.EnvdVersion}
}

func (b *Builder) agentLayer(ctx context.Context, work string) (cay.ImageLayer, error) {
	file := filepath.Join(work, "agent.erofs")
	if err := makeAgentLayer(ctx, b.Agent, work, file); err != nil {
		return cay.ImageLayer{}, err
	}
	return b.storeLayer(ctx, file)
}

// finish verifies a build and makes it visible.
func (b *Builder) finish(ctx context.Context, m cay.Manifest, rep *reporter) (cay.Manifest, error) {
	info, err := b.Node.Info(ctx)
	if err != nil {
		return cay.Manifest{}, fmt.Errorf("ask the node for its runtime: %w", err)
	}
	m.Runtime, m.RuntimeVersion = info.Runtime, info.RuntimeVersion
	rep.begin(stepVerify)
	if err := b.putManifest(ctx, candidateKey(m.Build), m); err != nil {
		return cay.Manifest{}, err
	}
	defer func() {
		if err := b.Blobs.Delete(context.WithoutCancel(ctx), candidateKey(m.Build)); err != nil {
			b.log().Warn("removing the candidate of a build", "build", m.Build, "err", err)
		}
	}()
	if err := b.verify(ctx, m); err != nil {
		return cay.Manifest{}, fmt.Errorf("verify build %s of template %s: %w", m.Build, m.Name, err)
	}
	if err := b.putManifest(ctx, ManifestKey(m.Build), m); err != nil {
		return cay.Manifest{}, err
	}
	if err := b.Registry.Publish(ctx, m); err != nil {
		// No name refers to it: away with it, or leave it, both are safe.
		_ = b.Blobs.Delete(context.WithoutCancel(ctx), ManifestKey(m.Build))
		return cay.Manifest{}, fmt.Errorf("publish build %s: %w", m.Build, err)
	}
	rep.end()
	b.log().Info("template build is ready", "template", m.Name, "build", m.Build)
	return m, nil
}

func (b *Builder) putManifest(ctx context.Context, k blob.Key, m cay.Manifest) error {
	r, err := encodeManifest(m)
	if err != nil {
		return err
	}
	if _, err := b.Blobs.Put(ctx, k, r); err != nil {
		return fmt.Errorf("store the manifest of build %s: %w", m.Build, err)
	}
	return nil
}

// verifyWithin bounds the boot and the probe; a cold machine takes seconds.
const verifyWithin = 2 * time.Minute

// verify boots the candidate and uses it.
func (b *Builder) verify(ctx context.Context, m cay.Manifest) error {
	ctx, cancel := context.WithTimeoutCause(ctx, verifyWithin, &cay.Error{Code: cay.CodeTemplateBuild, Layer: cay.LayerTemplate,
		Message: "the verification took longer than " + verifyWithin.String(), Fix: "try again when the machine is less busy"})
	defer cancel()
	var secret [32]byte
	rand.Read(secret[:])
	token := cay.Secret(hex.EncodeToString(secret[:]))
	c := cay.SandboxConfig{ID: cay.NewSandboxID(), TeamID: b.Team, Template: m.Template, Build: m.Build, Resources: m.Resources,
		AccessToken: token, Deadline: b.now().Add(verifyWithin)}
	s, err := b.Node.Create(ctx, c)
	if err == nil {
		err = b.Prober.Probe(ctx, s, token)
		if err != nil {
			err = b.withConsole(ctx, err, c.ID)
		}
		// Also after a probe that was cut off: nothing may be left running.
		kctx, kcancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer kcancel()
		if kerr := b.Node.Kill(kctx, c.ID, cay.EndRequest); kerr != nil && cay.CodeOf(kerr) != cay.CodeSandboxNotFound {
			err = errors.Join(err, fmt.Errorf("end the sandbox of the verification: %w", kerr))
		}
	}
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// consoleLines is how much of the guest's console a failed probe shows.
const consoleLines = 20

func (b *Builder) withConsole(ctx context.Context, err error, id cay.SandboxID) error {
	var e *cay.Error
	if !errors.As(err, &e) {
		return err
	}
	lines, cerr := b.Node.Console(ctx, id)
	if cerr != nil || len(lines) == 0 {
		return err
	}
	var text []string
	for _, l := range lines[max(len(lines)-consoleLines, 0):] {
		text = append(text, l.Text)
	}
	if e.Detail == nil {
		e.Detail = map[string]string{}
	}
	e.Detail["console"] = strings.Join(text, "\n")
	return err
}

const workPrefix = "build-"

// workDir makes a directory for one build; done removes it. Leftovers of
// builds that were killed go first.
func (b *Builder) workDir(ctx context.Context) (dir string, done func(), err error) {
	if err := b.clean(ctx); err != nil {
		b.log().Warn("removing what killed builds left", "err", err)
	}
	if err := os.MkdirAll(b.Dir, 0o700); err != nil {
		return "", nil, buildError("make the directory "+b.Dir, err, nil)
	}
	dir, err = os.MkdirTemp(b.Dir, workPrefix)
	if err != nil {
		return "", nil, buildError("make a directory in "+b.Dir, err, nil)
	}
	// The system's own root directory must not be private: MkdirTemp's mode is
	// that of its parent only.
	return dir, func() {
		if err := removeTree(dir); err != nil {
			b.log().Warn("removing the work of a build", "err", err)
		}
	}, nil
}

// clean removes candidates and work directories that are old: another process
// may have younger ones in use. Layers that no manifest names stay; removing
// them needs to know of every build under way.
func (b *Builder) clean(ctx context.Context) error {
	old := b.now().Add(-staleAfter)
	var errs []error
	objs, err := b.Blobs.List(ctx, "candidates/")
	errs = append(errs, err)
	for _, o := range objs {
		if o.Modified.Before(old) {
			errs = append(errs, b.Blobs.Delete(ctx, o.Key))
		}
	}
	entries, err := os.ReadDir(b.Dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err == nil && strings.HasPrefix(e.Name(), workPrefix) && fi.ModTime().Before(old) {
			errs = append(errs, removeTree(filepath.Join(b.Dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// checkRoom refuses a build that would fill the disk half-way.
func checkRoom(dir string, need int64) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return buildError("make the directory "+dir, err, nil)
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return buildError("measure the free space of "+dir, err, nil)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("building a template needs %d MiB in %s, %d are free", need>>20, dir, free>>20),
			Fix:     "free space on that file system", Detail: map[string]string{"path": dir, "freeBytes": fmt.Sprint(free), "needBytes": fmt.Sprint(need)}}
	}
	return nil
}
