package program

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/templates"
)

// buildEnv marks the run of the program that builds the system image.
const buildEnv = "CAY_TEST_BUILD"

// Image is the system image that servers under test get.
func Image() string { return os.Getenv(imageEnv) }

// prepareImage sets the environment for servers to take the system of the base
// template from an image, and makes that with the program itself if there is
// none yet for the recipe as it is.
func prepareImage() error {
	if os.Getenv(imageEnv) != "" || os.Getenv(buildEnv) != "" {
		return nil
	}
	key, err := recipeKey()
	if err != nil {
		return err
	}
	image := Cache("base", key+".erofs")
	if _, err := os.Stat(image); err != nil {
		fmt.Fprintln(os.Stderr, "building the base template with", Binary()+"; this takes minutes, once")
		if err := buildImage(image); err != nil {
			return fmt.Errorf("building the base template: %w", err)
		}
	}
	return os.Setenv(imageEnv, image)
}

// recipeKey names the recipe of the base template by its content.
func recipeKey() (string, error) {
	h := sha256.New()
	err := fs.WalkDir(templates.Files, "base", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := fs.ReadFile(templates.Files, path)
		fmt.Fprintf(h, "%s %d\n%s", path, len(b), b)
		return err
	})
	return hex.EncodeToString(h.Sum(nil))[:16], err
}

// buildImage lets the program build the base template, in a machine that has
// the real network, and keeps the largest layer, which is the system.
func buildImage(image string) error {
	if err := os.MkdirAll(filepath.Dir(image), 0o755); err != nil {
		return err
	}
	if err := os.Setenv(buildEnv, image); err != nil {
		return err
	}
	defer os.Unsetenv(buildEnv)
	code, err := runMachine(unix.CLONE_NEWPID|unix.CLONE_NEWNS|unix.CLONE_NEWIPC, os.Args[:1])
	if err == nil && code != 0 {
		err = fmt.Errorf("exit status %d", code)
	}
	return err
}

// runBuild is what the machine of buildImage does.
func runBuild(image string) error {
	p, err := newProgram(Options{})
	if err != nil {
		return err
	}
	p.progress = os.Stderr
	if err := p.up(); err != nil {
		return err
	}
	defer p.stop()
	layer, err := largest(filepath.Join(p.Dir, "blobs"))
	if err != nil {
		return err
	}
	if err := copyFile(image+".new", layer, 0o644); err != nil {
		return err
	}
	return os.Rename(image+".new", image)
}

func copyFile(to, from string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func largest(dir string) (path string, err error) {
	var size int64
	err = filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		fi, err := e.Info()
		if err == nil && fi.Size() > size {
			path, size = p, fi.Size()
		}
		return err
	})
	if err == nil && path == "" {
		err = fmt.Errorf("%s holds no file", dir)
	}
	return path, err
}
