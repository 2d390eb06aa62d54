package envd

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	fs "github.com/cayhq/cay/internal/gen/envd/filesystem"
	pb "github.com/cayhq/cay/internal/gen/envd/process"
	"github.com/cayhq/cay/test/program"
)

// 500 commands run at the same time beside 200 watchers of one sandbox, and
// every one gets all that is its own: a tenth of the watchers what all the
// commands do, the others what one does.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	const commands, watchers = 500, 200
	b := newBox(t, program.Start(t, program.Options{MemoryMB: 2048}), 10*time.Minute)
	b.Out(t, fmt.Sprintf("mkdir -p /tmp/many; for i in $(seq 0 %d); do mkdir /tmp/one$i; done; mkfifo /tmp/gate", commands-1))
	ctx := t.Context()

	var watching, running errgroup.Group
	ready := make(chan struct{}, watchers)
	for i := range watchers {
		watching.Go(func() error {
			path, want := "/tmp/many", commands
			if i%10 != 0 {
				path, want = fmt.Sprintf("/tmp/one%d", i), 1
			}
			st, err := b.files.WatchDir(ctx, as("", &fs.WatchDirRequest{Path: path, Recursive: i%20 == 0}))
			if err != nil {
				ready <- struct{}{}
				return fmt.Errorf("watcher %d: %w", i, err)
			}
			defer st.Close()
			seen := map[string]bool{}
			for len(seen) < want && st.Receive() {
				if st.Msg().GetStart() != nil {
					ready <- struct{}{}
				}
				if e := st.Msg().GetFilesystem(); e.GetType() == fs.EventType_EVENT_TYPE_CREATE {
					seen[e.GetName()] = true
				}
			}
			if len(seen) < want {
				return fmt.Errorf("watcher %d saw %d files of %d: %w", i, len(seen), want, st.Err())
			}
			return nil
		})
	}
	for range watchers {
		<-ready
	}
	started := make(chan struct{}, commands)
	for i := range commands {
		running.Go(func() error {
			st, _, err := b.start(ctx, "", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/sh",
				Args: []string{"-c", fmt.Sprintf(`touch /tmp/many/%d /tmp/one%d/x; read x </tmp/gate; seq %d %d; exit %d`, i, i, i*100, i*100+99, i%7)}}})
			started <- struct{}{}
			if err != nil {
				return fmt.Errorf("command %d: %w", i, err)
			}
			var out, want strings.Builder
			end, err := ended(st, func(p []byte) { out.Write(p) })
			if err != nil || int(end.GetExitCode()) != i%7 {
				return fmt.Errorf("command %d ended with %v, %w", i, end, err)
			}
			for n := range 100 {
				fmt.Fprintln(&want, i*100+n)
			}
			if out.String() != want.String() {
				return fmt.Errorf("command %d printed %q", i, out.String())
			}
			return nil
		})
	}
	for range commands {
		<-started
	}
	r, err := b.proc.List(ctx, as("", &pb.ListRequest{}))
	if err != nil || len(r.Msg.GetProcesses()) != commands {
		t.Errorf("%d commands are listed, want %d: %v", len(r.Msg.GetProcesses()), commands, err)
	}
	t.Logf("envd has %.1f MiB with all of them", b.envdMemory(t))
	if err := watching.Wait(); err != nil {
		t.Error(err)
	}
	// The gate opens for all: whoever opened it to read finds no writer any more.
	b.Out(t, fmt.Sprintf("n=%d", commands)+`; exec 3<>/tmp/gate; for i in $(seq $n); do echo x >&3; done; while [ $(pgrep -fc 'touch /tmp/many') -gt 1 ]; do sleep 0.1; done`)
	if err := running.Wait(); err != nil {
		t.Error(err)
	}
}
