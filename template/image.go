package template

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/cayhq/cay"
)

// Paths of the agent in the guest; part of the guest's contract.
const (
	InitPath = "/usr/bin/cay-init"
	EnvdPath = "/usr/bin/envd"
	// EnvdSumPath has the digest of the daemon's binary, so that the daemon
	// need not read all of itself to say what it is.
	EnvdSumPath = EnvdPath + ".sha256"
)

// Agent is what Cay puts into every guest.
type Agent struct {
	Init []byte // the static binary that is PID 1
	Envd []byte // the static daemon binary
	// EnvdVersion is what envd reports, for the manifest.
	EnvdVersion string
}

func (a Agent) check() error {
	for _, f := range []struct {
		name string
		b    []byte
	}{{"init", a.Init}, {"envd", a.Envd}} {
		// A program that was embedded from a failed build is often empty, or a
		// script; PID 1 would then fail in a way that is hard to read.
		if len(f.b) < 64 || string(f.b[:4]) != "\x7fELF" {
			return &cay.Error{Code: cay.CodeTemplateBuild, Layer: cay.LayerTemplate,
				Message: "the " + f.name + " that is built into this program is no ELF binary", Fix: "build Cay again with `make build`"}
		}
	}
	return nil
}

// epoch is the time of everything in an agent layer: equal binaries must give
// equal layers. 2020-01-01, since some programs take 1970 for "unset".
const epoch = 1577836800

// makeAgentLayer writes the agent's image to file.
func makeAgentLayer(ctx context.Context, a Agent, dir, file string) error {
	if err := a.check(); err != nil {
		return err
	}
	tree := filepath.Join(dir, "agent")
	bin := filepath.Join(tree, filepath.Dir(InitPath))
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return buildError("write the agent", err, nil)
	}
	h := sha256.New()
	sum := fmt.Appendf(nil, "%x  %s\n", sha256.Sum256(a.Envd), filepath.Base(EnvdPath))
	for _, f := range []struct {
		path string
		b    []byte
		mode fs.FileMode
	}{{InitPath, a.Init, 0o755}, {EnvdPath, a.Envd, 0o755}, {EnvdSumPath, sum, 0o644}} {
		p := filepath.Join(tree, f.path)
		err := os.WriteFile(p, f.b, f.mode)
		if err == nil {
			err = os.Chmod(p, f.mode) // whatever the umask
		}
		if err != nil {
			return buildError("write the agent", err, nil)
		}
		fmt.Fprintf(h, "%s %d ", f.path, len(f.b))
		h.Write(f.b)
	}
	// In an overlay the top layer's folders decide owner and mode.
	for d := bin; strings.HasPrefix(d, tree); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			return buildError("write the agent", err, nil)
		}
	}
	return makeImage(ctx, tree, file, imageOptions{id: uuid.NewSHA1(uuid.Nil, h.Sum(nil)), epoch: epoch, fixed: true})
}

type imageOptions struct {
	id    uuid.UUID
	epoch int64
	// fixed gives every file the epoch as its time and root as its owner;
	// else files keep both, and none is younger than the epoch.
	fixed bool
}

// makeImage makes an EROFS image of a directory. See DESIGN.md for the options:
// no compression, no xattrs (gVisor's own EROFS reader refuses files that have
// them), no inlined tails (the same), and modification times kept, since
// compiled Python is only used while its source has the time it was compiled
// from.
func makeImage(ctx context.Context, dir, file string, o imageOptions) error {
	args := []string{"-x-1", "-E", "noinline_data", "-U", o.id.String(), "--quiet"}
	if o.fixed {
		args = append(args, "-T"+strconv.FormatInt(o.epoch, 10), "--all-root")
	}
	cmd := exec.CommandContext(ctx, "mkfs.erofs", append(args, file, dir)...)
	if !o.fixed {
		cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+strconv.FormatInt(o.epoch, 10))
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return &cay.Error{Code: cay.CodeTemplateBuild, Layer: cay.LayerTemplate,
			Message: "the program mkfs.erofs is missing; it makes the images of templates",
			Fix:     "install it: apt-get install erofs-utils", Err: err}
	}
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return buildError("make the image with mkfs.erofs", err, strings.Split(strings.TrimSpace(string(out)), "\n"))
	}
	return nil
}

// storeLayer puts an image file into the store under its digest.
func (b *Builder) storeLayer(ctx context.Context, file string) (cay.ImageLayer, error) {
	f, err := os.Open(file)
	if err != nil {
		return cay.ImageLayer{}, buildError("read the image", err, nil)
	}
	defer f.Close()
	d, n, err := digestOf(ctx, f)
	if err != nil {
		return cay.ImageLayer{}, buildError("read the image", err, nil)
	}
	l := cay.ImageLayer{Digest: d, SizeBytes: n, Kind: KindEROFS}
	if o, err := b.Blobs.Stat(ctx, LayerKey(d)); err == nil && o.SizeBytes == n {
		return l, nil
	}
	if _, err := f.Seek(0, 0); err != nil {
		return cay.ImageLayer{}, buildError("read the image", err, nil)
	}
	if _, err := b.Blobs.Put(ctx, LayerKey(d), f); err != nil {
		return cay.ImageLayer{}, fmt.Errorf("store the layer %s: %w", d, err)
	}
	return l, nil
}

// removeTree removes a directory and refuses to enter another file system: a
// build that was killed may have left the host's /dev mounted inside.
func removeTree(dir string) error {
	fi, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	dev := fi.Sys().(*syscall.Stat_t).Dev
	err = filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		if fi.Sys().(*syscall.Stat_t).Dev != dev {
			return fmt.Errorf("%s is on another file system; unmount it first", p)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return os.RemoveAll(dir)
}

// staleAfter is how old the leftovers of a build are when they are removed.
const staleAfter = 24 * time.Hour
