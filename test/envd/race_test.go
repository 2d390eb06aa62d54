package envd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	fs "github.com/cayhq/cay/internal/gen/envd/filesystem"
	"github.com/cayhq/cay/test/program"
)

// victims is what belongs to root and what the account must neither change nor
// learn. The sum is over names, modes, owners and contents.
const victims = `mkdir -p /srv/v/closed /srv/v/open
echo secret >/srv/v/closed/secret; echo shown >/srv/v/open/shown; echo mine >/srv/v/open/mine
chmod 700 /srv/v/closed; chmod 755 /srv/v /srv/v/open; chmod 644 /srv/v/open/shown; chmod 600 /srv/v/open/mine /srv/v/closed/secret`

const victimSum = `cd /srv/v && { find . -printf '%p %m %u %g %s\n' | sort; find . -type f | sort | xargs cat; ls -a /srv / /etc /root; cat /etc/passwd /etc/shadow; } | sha256sum`

// upload is POST /files as an account.
func (b *box) upload(ctx context.Context, user, path, content string) error {
	var body bytes.Buffer
	w := multipart.NewWriter(&body)
	part, err := w.CreateFormFile("file", "f")
	if err == nil {
		_, err = io.WriteString(part, content)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	q := url.Values{"path": {path}, "username": {user}}
	resp, err := b.Request(ctx, http.MethodPost, program.EnvdPort, "/files?"+q.Encode(), w.FormDataContentType(), &body)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// download is GET /files as an account.
func (b *box) download(ctx context.Context, user, path string) (string, error) {
	q := url.Values{"path": {path}, "username": {user}}
	resp, err := b.Request(ctx, http.MethodGet, program.EnvdPort, "/files?"+q.Encode(), "", nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// compose is POST /files/compose as an account.
func (b *box) compose(ctx context.Context, user, to string, from ...string) error {
	body := `{"source_paths":["` + strings.Join(from, `","`) + `"],"destination":"` + to + `","username":"` + user + `"}`
	resp, err := b.Request(ctx, http.MethodPost, program.EnvdPort, "/files/compose", "application/json", strings.NewReader(body))
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// attacks are all operations on a path; each returns what it learned. dir is
// what the account may write to, or what somebody swaps with a link.
func (b *box) attacks(ctx context.Context, dir, name string) map[string]func() string {
	said := func(text string, err error) string {
		if err != nil {
			return ""
		}
		return text
	}
	path := dir + "/" + name
	return map[string]func() string{
		"upload":   func() string { return said("", b.upload(ctx, "user", path, "changed")) },
		"new file": func() string { return said("", b.upload(ctx, "user", dir+"/planted", "planted")) },
		"new tree": func() string { return said("", b.upload(ctx, "user", dir+"/planted.d/x/y", "planted")) },
		"download": func() string { return said(b.download(ctx, "user", path)) },
		"remove":   func() string { return said("", b.remove(ctx, "user", path)) },
		"make": func() string {
			_, err := b.files.MakeDir(ctx, as("user", &fs.MakeDirRequest{Path: dir + "/planted.dir/sub"}))
			return said("", err)
		},
		"move away": func() string {
			_, err := b.files.Move(ctx, as("user", &fs.MoveRequest{Source: path, Destination: "/home/user/loot/" + name}))
			return said("", err)
		},
		"move over": func() string {
			if err := b.upload(ctx, "user", "/home/user/bullet", "changed"); err != nil {
				return ""
			}
			_, err := b.files.Move(ctx, as("user", &fs.MoveRequest{Source: "/home/user/bullet", Destination: path}))
			return said("", err)
		},
		"compose from": func() string {
			if b.compose(ctx, "user", "/home/user/loot/composed", path) != nil {
				return ""
			}
			return said(b.download(ctx, "user", "/home/user/loot/composed"))
		},
		"compose to": func() string {
			if err := b.upload(ctx, "user", "/home/user/part", "changed"); err != nil {
				return ""
			}
			return said("", b.compose(ctx, "user", path, "/home/user/part"))
		},
		"list": func() string {
			r, err := b.files.ListDir(ctx, as("user", &fs.ListDirRequest{Path: dir, Depth: 3}))
			if err != nil {
				return ""
			}
			return r.Msg.String()
		},
	}
}

// As the account, no operation changes, replaces, removes or reads what is
// root's, by whatever path it is named.
func TestIdentity(t *testing.T) {
	t.Parallel()
	b := newBox(t, program.Start(t, program.Options{}), 10*time.Minute)
	b.root(t, victims)
	b.Out(t, `mkdir loot; ln -s /srv/v/open link; ln -s /srv/v/closed closed; ln -s /srv/v/closed/secret direct; mkdir real; ln /srv/v/open/shown real/hard 2>/dev/null; true`)
	before := b.root(t, victimSum)
	for _, target := range []struct{ dir, name string }{
		{"/srv/v/open", "shown"}, {"/srv/v/open", "mine"}, {"/srv/v/closed", "secret"}, {"/home/user/link", "mine"},
		{"/home/user/closed", "secret"}, {"/home/user", "direct"}, {"/home/user/../../srv/v/closed", "secret"},
		{"/proc/self/root/srv/v/closed", "secret"}, {"/proc/1/root/srv/v/closed", "secret"}, {"/proc/1/cwd/srv/v/closed", "secret"},
		{"/etc", "passwd"}, {"/etc", "shadow"}, {"/root", ".bashrc"}, {"/", "etc"}, {"/usr/bin", "envd"},
	} {
		for name, attack := range b.attacks(t.Context(), target.dir, target.name) {
			got := attack()
			if told := strings.HasPrefix(got, "secret\n") || strings.HasPrefix(got, "mine\n") || strings.HasPrefix(got, "root:") && target.name == "shadow"; told {
				t.Errorf("%s of %s/%s told %q", name, target.dir, target.name, got)
			}
		}
		if after := b.root(t, victimSum); after != before {
			t.Fatalf("%s/%s: something of root's has changed", target.dir, target.name)
		}
		b.Out(t, `rm -rf loot bullet part planted planted.d planted.dir; mkdir loot; rm -f direct; ln -s /srv/v/closed/secret direct`)
	}
	if _, err := b.download(t.Context(), "user", "/proc/self/environ"); err == nil {
		t.Error("the account reads envd's environment")
	}
}

// swapper exchanges a directory for links to root's, as fast as it can.
const swapper = `cd /home/user && mkdir -p stage/d && cat >swap.py <<'X'
import os, shutil, sys, time
os.chdir("/home/user/stage")
end = time.monotonic() + float(sys.argv[1])
n = 0
targets = ["/srv/v/open", "/srv/v/closed"]
while time.monotonic() < end:
    try:
        os.rename("d", "old")
        os.symlink(targets[n % 2], "d")
        time.sleep(0.0005 * (n % 3))
        os.unlink("d")
        os.rename("old", "d")
        n += 1
    except OSError:  # envd has made something in between
        for name in ("d", "old"):
            if os.path.islink(name):
                os.unlink(name)
            else:
                shutil.rmtree(name, ignore_errors=True)
        os.makedirs("d", exist_ok=True)
    if n % 16 == 0:
        for name in ("shown", "mine", "secret"):
            try:
                with open("d/" + name, "w") as f: f.write("own")
            except OSError:
                pass
print(n)
X`

// While a directory is exchanged for a link to root's, no operation in it
// reaches root's.
func TestSwapRace(t *testing.T) {
	t.Parallel()
	b := newBox(t, program.Start(t, program.Options{}), 10*time.Minute)
	b.root(t, victims)
	b.Out(t, swapper+"\nmkdir -p loot")
	before := b.root(t, victimSum)
	seconds := program.Sized(4, 10)
	p, err := b.Start(t.Context(), "user", fmt.Sprintf("python3 /home/user/swap.py %d", seconds))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), time.Duration(seconds)*time.Second)
	defer stop()
	var tried atomic.Int64
	var wg sync.WaitGroup
	for _, name := range []string{"shown", "mine", "secret"} {
		for what, attack := range b.attacks(ctx, "/home/user/stage/d", name) {
			wg.Go(func() {
				for ctx.Err() == nil {
					tried.Add(1)
					// A link may be read through, and "shown" is for everybody.
					if got := attack(); strings.Contains(got, "secret\n") || strings.Contains(got, "mine\n") {
						t.Errorf("%s of %s told %q", what, name, got)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	r, err := p.Wait()
	if err != nil || r.Code != 0 {
		t.Fatalf("the swapper: %v, %s", err, r)
	}
	t.Logf("%d operations during %s exchanges", tried.Load(), strings.TrimSpace(r.Stdout))
	if after := b.root(t, victimSum); after != before {
		t.Errorf("something of root's has changed:\n%s", b.root(t, "find /srv/v -printf '%p %m %u %g %s\\n'; head -100 /srv/v/*/*"))
	}
	if left := b.root(t, "find /home/user /srv -name '.envd-*'"); left != "" {
		t.Errorf("envd left %s", left)
	}
}
