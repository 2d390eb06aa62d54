package main

import (
	"context"
	"fmt"
	"os"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/envd"
	"github.com/cayhq/cay/template"
	"github.com/cayhq/cay/templates"
)

// ensureTemplate makes the base template if there is none, gives it this
// build's agent if it has another, and keeps it warm.
func (s *server) ensureTemplate(ctx context.Context) error {
	b, err := s.builder()
	if err != nil {
		return err
	}
	m, fresh, err := b.Refresh(ctx, baseTemplate)
	switch cay.CodeOf(err) {
	case "":
		if fresh {
			s.rep.progress("the base template has this build's agent now")
		}
	case cay.CodeTemplateNotFound:
		s.rep.progress("making the base template: Debian with python, node and git; this takes some minutes, once")
		if m, err = s.buildBase(ctx, b); err != nil {
			return err
		}
	default:
		return fmt.Errorf("checking the base template: %w", err)
	}
	s.host.orch.Warm(m.Build, m.Resources)
	return nil
}

func (s *server) builder() (*template.Builder, error) {
	envdBin, err := guestBinary("envd")
	if err != nil {
		return nil, err
	}
	initBin, err := guestBinary("init")
	if err != nil {
		return nil, err
	}
	progress := template.Printer(progressWriter{s.rep}, s.rep.pipe == nil && isTerminal(s.rep.err), false)
	return &template.Builder{
		Blobs: s.host.blobs, Node: s.host.orch, Registry: registry{s.store, cay.TeamID(s.creds.TeamID)},
		Prober: template.EnvdProber{Port: envd.Port},
		Agent:  template.Agent{Init: initBin, Envd: envdBin, EnvdVersion: envd.Version},
		Dir:    s.dir.path("work"), Team: cay.TeamID(s.creds.TeamID),
		Progress: progress, Log: s.log.With("part", "template"),
	}, nil
}

// imageEnv names an EROFS image of the base system, made elsewhere, that saves
// the minutes of building one: for tests and for machines without a mirror.
const imageEnv = "CAY_BASE_IMAGE"

func (s *server) buildBase(ctx context.Context, b *template.Builder) (cay.Manifest, error) {
	r, err := template.ReadRecipe(templates.Files, baseTemplate)
	if err != nil {
		return cay.Manifest{}, err
	}
	r.Resources = cay.Resources{CPUs: s.cfg.CPUs, MemoryMB: s.cfg.MemoryMB, DiskMB: s.cfg.DiskMB}
	if image := os.Getenv(imageEnv); image != "" {
		s.rep.progress("using the system image %s", image)
		return b.BuildFromImage(ctx, r, image)
	}
	return b.Build(ctx, r)
}

// progressWriter passes a builder's lines to whoever waits for the server.
type progressWriter struct{ rep *reporter }

func (w progressWriter) Write(p []byte) (int, error) {
	if w.rep.pipe == nil {
		return w.rep.err.Write(p)
	}
	w.rep.progressText(string(p))
	return len(p), nil
}
