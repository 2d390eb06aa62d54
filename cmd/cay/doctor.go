package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/blob/file"
	"github.com/cayhq/cay/doctor"
	"github.com/cayhq/cay/internal/cli"
	"github.com/cayhq/cay/internal/settings"
	"github.com/cayhq/cay/orchestrator"
	"github.com/cayhq/cay/runtime"
	"github.com/cayhq/cay/runtime/gvisor"
	"github.com/cayhq/cay/store"
	"github.com/cayhq/cay/template"
)

func newDoctorCmd(a *app) *cobra.Command {
	var deep, asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check this machine and the data directory",
		Long: `Checks host, network, storage, engine and templates, and looks for what ended
sandboxes may have left. Each finding has its evidence, and its repair where one
is needed. It makes and removes a network, disks and an engine of its own; what
runs is not disturbed.

With --deep it also compares the digests of templates, and makes a sandbox on
the running server, uses it and ends it.

The exit status is 1 if a check failed; warnings do not count.`,
		Example: "  cay doctor\n  cay doctor --deep\n  cay doctor --json | jq '.checks[] | select(.verdict == \"fail\")'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.settings(cmd)
			if err != nil {
				return err
			}
			d, closeParts, err := newDoctor(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			defer closeParts()
			d.Deep = deep
			report := d.Run(cmd.Context())
			if asJSON {
				err = cli.WriteJSON(a.out, report)
			} else {
				err = report.Print(a.out, isTerminal(a.out) && os.Getenv("NO_COLOR") == "")
			}
			if err == nil && report.Count(doctor.Fail) > 0 {
				err = &cli.ExitError{Status: 1}
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&deep, "deep", false, "also compare digests, and use a sandbox")
	cmd.Flags().BoolVar(&asJSON, "json", false, "the report as JSON")
	return cmd
}

// newDoctor gives a doctor the parts of the product that it asks.
func newDoctor(ctx context.Context, cfg settings.Settings) (*doctor.Doctor, func(), error) {
	dir := dataDir(cfg.DataDir)
	log, err := newLogger(cfg, io.Discard)
	if err != nil {
		return nil, nil, err
	}
	h := newHost(dir, cfg, log, nil) // for the names of things; nothing of it is opened
	d := doctor.New(cfg.DataDir, h.nets.NamespaceDir, h.nets.StateDir)
	d.APIAddr, d.ProxyAddr, d.Domain, d.CIDR = cfg.APIAddr, cfg.ProxyAddr, cfg.Domain, cfg.SandboxCIDR
	if cfg.Certificates != certificatesOff {
		d.TLSAddr = cfg.TLSAddr
	}
	d.ReserveBytes, d.MemoryMB = int64(cfg.DiskReserveMB)<<20, cfg.MemoryMB
	d.Tag = h.nets.Tag
	d.InstanceDir, d.CgroupParent = gvisor.HostNames(dir.path("run", "gvisor"))
	d.Engine = tryEngine

	s, err := locate(cfg.DataDir)
	if err == nil {
		client, err := cli.NewClient(s)
		if err != nil {
			return nil, nil, err
		}
		d.Server = &doctor.Server{PID: s.PID, Health: client.Health}
		d.Trial = cli.NewTrial(client, baseTemplate)
		if info, err := dir.readServer(); err == nil && info.Domain != "" {
			d.Domain = domainOnly(info.Domain)
			d.TLSAddr = info.TLSAddr
			d.Certificate = handshake(info)
		}
		d.APIAddr, d.ProxyAddr = strings.TrimPrefix(s.APIURL, "http://"), strings.TrimPrefix(s.ProxyURL, "http://")
	}
	d.Starting = dir.starting()
	if _, err := os.Stat(dir.credentialsFile()); err != nil {
		return d, func() {}, nil // never used: the parts do not exist yet
	}
	d.Owned = func(context.Context) (doctor.Owned, error) {
		executions, slots, err := orchestrator.Owned(dir.path("run", "orchestrator"))
		return doctor.Owned{Executions: executions, Slots: slots}, err
	}
	d.Earlier = func(context.Context) ([]doctor.EarlierEngine, error) {
		return earlierEngines(engineFiles{h.rt.Programs}, h.orch.Dir, h.orch.SnapshotDir)
	}
	d.OtherEnvd = func(context.Context) ([]string, error) { return otherEnvd(dir.path("run", "orchestrator")) }
	open := sync.OnceValues(func() (*file.Store, error) { return file.Open(ctx, dir.path("blobs")) })
	d.Blobs = func(context.Context) (blob.Store, error) { return open() }
	if _, err := os.Stat(dir.path("cay.db")); err == nil {
		withRecord(d, dir)
	}
	return d, func() {
		if blobs, err := open(); err == nil {
			_ = blobs.Close() // it was read only
		}
	}, nil
}

// earlierEngines lists the engines that are not the one of this program.
func earlierEngines(files engineFiles, records, snapshots string) ([]doctor.EarlierEngine, error) {
	present := ""
	if packed, err := guestFS.ReadFile("guest/" + engineName); err == nil {
		present = nameOfEngine(packed)
	}
	names, err := files.List()
	if err != nil {
		return nil, err
	}
	holders, err := orchestrator.EngineHolders(records, snapshots)
	if err != nil {
		return nil, err
	}
	var out []doctor.EarlierEngine
	for _, n := range names {
		if _, held := holders[n]; !held && n != present {
			out = append(out, doctor.EarlierEngine{Program: n, Kept: true})
		}
	}
	for n, h := range holders {
		if h.Version == gvisor.Version() {
			continue // the present one serves it
		}
		e := doctor.EarlierEngine{Program: n, Version: h.Version, Kept: slices.Contains(names, n)}
		for _, id := range h.Guests {
			e.Guests = append(e.Guests, string(id))
		}
		for _, id := range h.Snapshots {
			e.Snapshots = append(e.Snapshots, string(id))
		}
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b doctor.EarlierEngine) int {
		return cmp.Or(strings.Compare(a.Version, b.Version), strings.Compare(a.Program, b.Program))
	})
	return out, nil
}

// otherEnvd lists the sandboxes that have another envd than this program gives.
func otherEnvd(records string) ([]string, error) {
	present, err := envdForGuests()
	if err != nil || present.Digest == "" {
		return nil, err
	}
	holders, err := orchestrator.EnvdHolders(records)
	var out []string
	for digest, ids := range holders {
		if digest == present.Digest {
			continue
		}
		for _, id := range ids {
			out = append(out, string(id))
		}
	}
	slices.Sort(out)
	return out, err
}

// mostTemplates bounds the check of templates.
const mostTemplates = 1000

// withRecord adds the checks that need the database.
func withRecord(d *doctor.Doctor, dir dataDir) {
	d.Store = func(ctx context.Context) error {
		st, err := openStore(ctx, dir)
		if err != nil {
			return err
		}
		return st.Close()
	}
	d.Templates = func(ctx context.Context, digests bool) ([]doctor.Template, error) {
		blobs, err := d.Blobs(ctx)
		if err != nil {
			return nil, err
		}
		st, err := openStore(ctx, dir)
		if err != nil {
			return nil, err
		}
		defer st.Close()
		creds, err := dir.readCredentials()
		if err != nil {
			return nil, err
		}
		list, err := st.ListTemplates(ctx, cay.TeamID(creds.TeamID), store.Cursor{}, mostTemplates)
		if err != nil {
			return nil, err
		}
		var out []doctor.Template
		for _, t := range list {
			b := t.Current.ID
			if b == "" {
				continue // it has no finished build yet
			}
			got := doctor.Template{Name: t.Name, Build: string(b)}
			m, err := template.Load(ctx, blobs, b)
			if err == nil && digests {
				err = template.Verify(ctx, blobs, m)
			}
			for _, l := range m.Layers {
				got.Bytes += l.SizeBytes
			}
			got.Err = err
			out = append(out, got)
		}
		return out, nil
	}
}

// tryEngine starts an engine in a directory of its own and ends it.
func tryEngine(ctx context.Context) (info runtime.Info, err error) {
	// Directly below the system's: the path of a socket may not be long.
	dir, err := os.MkdirTemp("", "cay-doctor-")
	if err != nil {
		return info, fmt.Errorf("making a directory for a trial of the engine: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	rt := gvisor.New(filepath.Join(dir, "e"))
	rt.Args = []string{os.Args[0], "supervise", "--dir", rt.Dir}
	if err := rt.Open(ctx); err != nil {
		return info, err
	}
	info, err = rt.Info(ctx)
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return info, errors.Join(err, rt.Shutdown(end), rt.Close())
}
