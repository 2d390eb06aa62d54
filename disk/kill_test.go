package disk

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cayhq/cay"
)

// victimEnv turns the test binary into a process that makes and removes disks
// until it is killed: "<dir> <digest> <file>".
const victimEnv = "CAY_DISK_TEST_VICTIM"

// holderEnv turns it into one that stays until its input ends.
const holderEnv = "CAY_DISK_TEST_HOLDER"

func TestMain(m *testing.M) {
	if arg := os.Getenv(victimEnv); arg != "" {
		victim(strings.Fields(arg))
	}
	if os.Getenv(holderEnv) != "" {
		fmt.Println("there")
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func victim(arg []string) {
	ctx := context.Background()
	d := &Disks{Dir: arg[0], Ahead: 1}
	if err := d.Open(ctx); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	spec := Spec{Layers: []Layer{{Digest: cay.Digest(arg[1]), File: arg[2]}}, SizeMB: 64}
	for i := 0; ; i++ {
		spec.ID = fmt.Sprintf("p%d-%d", os.Getpid(), i)
		if _, err := d.Create(ctx, spec); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		if i >= 2 {
			if err := d.Remove(ctx, fmt.Sprintf("p%d-%d", os.Getpid(), i-2)); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
		}
	}
}

// A process killed at random instants leaves nothing that its successor does
// not list and remove; the ready disks it held go by themselves.
func TestKilled(t *testing.T) {
	rounds := 15
	if testing.Short() {
		rounds = 3
	}
	dir := newDir(t)
	lower := layer(t, map[string]string{"f": "1"})
	d := openDisks(t, &Disks{Dir: dir})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range rounds {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), victimEnv+"="+strings.Join([]string{dir, string(lower.Digest), lower.File}, " "))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil || line != "ready\n" {
			t.Fatalf("the victim said %q, %v", line, err)
		}
		<-time.After(time.Duration(rand.IntN(60_000)) * time.Microsecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()

		if err := d.Open(t.Context()); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		ids, err := d.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(ids) > 4 {
			t.Errorf("round %d: %v were left, at most 4 can be", i, ids)
		}
		for _, id := range ids {
			if err := d.Remove(t.Context(), id); err != nil {
				t.Fatalf("round %d: %v", i, err)
			}
		}
		// What is left is the pool and the layer.
		if m := mountsUnder(t, dir); len(m) > 2 {
			t.Fatalf("round %d: mounts %v", i, m)
		}
		if l := gone(func() []string {
			return slices.DeleteFunc(loops(t, dir), func(f string) bool { return strings.HasSuffix(f, "/"+poolFile) })
		}); l != nil {
			t.Fatalf("round %d: loop devices %v", i, l)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A mount namespace that was made meanwhile holds the pool for as long as it
// lives; who opens the pool again waits for its end.
func TestHeldElsewhere(t *testing.T) {
	dir := newDir(t)
	d := &Disks{Dir: dir}
	openDisks(t, d)
	if d.Capabilities().Design != DesignPool {
		t.Skip("there is no pool: the file system of the tests clones files itself")
	}
	other := exec.Command("/proc/self/exe", "-test.run=^$")
	stdin, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	other.Env = append(os.Environ(), holderEnv+"=1")
	other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Close(), d.Release(t.Context())); err != nil {
		t.Fatal(err)
	}
	if len(loopsOf(d.path(poolFile))) == 0 {
		t.Error("the other namespace does not hold the pool")
	}
	short, stop := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer stop()
	if err := d.Open(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("opened while another namespace had the pool: %v", err)
	}
	go func() {
		<-time.After(300 * time.Millisecond)
		stdin.Close()
	}()
	if err := d.Open(t.Context()); err != nil {
		t.Error(err)
	}
	_ = other.Wait()
}
