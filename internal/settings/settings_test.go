package settings_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/settings"
)

func sources(t *testing.T, file string, env, flags map[string]string) settings.Sources {
	t.Helper()
	dir := t.TempDir()
	if file != "" {
		if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all := map[string]string{"data-dir": dir}
	for k, v := range flags {
		all[k] = v
	}
	return settings.Sources{Env: func(k string) (string, bool) { v, ok := env[k]; return v, ok }, Flags: all}
}

func TestOrder(t *testing.T) {
	file := "# a comment\npool-size: 3\napi-addr: \"127.0.0.1:4000\" \ndisk-mb: 2048 # small\n"
	s, err := settings.Load(sources(t, file, map[string]string{"CAY_POOL_SIZE": "4", "CAY_MEMORY_MB": "512"}, map[string]string{"pool-size": "5"}))
	if err != nil {
		t.Fatal(err)
	}
	if s.PoolSize != 5 || s.MemoryMB != 512 || s.APIAddr != "127.0.0.1:4000" || s.DiskMB != 2048 || s.CPUs != 2 {
		t.Errorf("got %+v", s)
	}
	origins := map[string]string{"pool-size": "flag:--pool-size", "memory-mb": "env:CAY_MEMORY_MB", "api-addr": "config.yaml:3", "cpus": "default"}
	for _, v := range s.Values() {
		if want, ok := origins[v.Name]; ok && !strings.HasSuffix(string(v.Origin), want) {
			t.Errorf("%s comes from %s, want …%s", v.Name, v.Origin, want)
		}
		if v.Doc == "" {
			t.Errorf("%s has no text", v.Name)
		}
	}
}

func TestWrongValues(t *testing.T) {
	for _, c := range []struct {
		file       string
		env, flags map[string]string
		want       string
	}{
		{file: "pool-size: many", want: "config.yaml:1"},
		{file: "no colon", want: "config.yaml:1"},
		{file: "colour: red", want: `unknown setting "colour"`},
		{file: "data-dir: /x", want: "found through it"},
		{env: map[string]string{"CAY_API_ADDR": "3000"}, want: "env:CAY_API_ADDR"},
		{flags: map[string]string{"api-addr": "127.0.0.1:70000"}, want: "0 to 65535"},
		{flags: map[string]string{"sandbox-cidr": "fd00::/8"}, want: "IPv4"},
		{flags: map[string]string{"refused-ranges": "192.0.2.0/24,example.com"}, want: `"example.com" is no address`},
		{flags: map[string]string{"refused-ranges": "fe80::1%eth0"}, want: "no address"},
		{flags: map[string]string{"sandbox-connections-per-second": "0"}, want: "from 1"},
		{flags: map[string]string{"memory-mb": "1"}, want: "from 128"},
		{flags: map[string]string{"log-level": "loud"}, want: "one of debug"},
		{flags: map[string]string{"domain": "a..b"}, want: "domain name"},
		{flags: map[string]string{"domain": "sbx.example.com:443"}, want: "without a port"},
		{flags: map[string]string{"certificates": "some"}, want: "one of off, files, local, acme"},
		{flags: map[string]string{"certificates": "local"}, want: "set domain"},
		{flags: map[string]string{"certificates": "files", "domain": "a.b", "cert-file": "/x"}, want: "key-file is missing"},
		{flags: map[string]string{"redirect-http": "on"}, want: "no HTTPS"},
		{flags: map[string]string{"acme-directory": "http://a"}, want: "https://"},
		{flags: map[string]string{"acme-dns": "rfc2136:a"}, want: "rfc2136:192.0.2.1:53"},
		{flags: map[string]string{"acme-dns": "exec:hook"}, want: "absolute"},
		{flags: map[string]string{"acme-dns": "route53"}, want: "rfc2136"},
		{flags: map[string]string{"certificates": "acme", "domain": "a.b", "acme-dns-key": "/k"}, want: "acme-dns is not rfc2136"},
	} {
		_, err := settings.Load(sources(t, c.file, c.env, c.flags))
		if cay.CodeOf(err) != cay.CodeConfigInvalid || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v", c, err)
		}
	}
}

func TestNamedFileMustExist(t *testing.T) {
	src := sources(t, "", nil, nil)
	src.File = filepath.Join(t.TempDir(), "nothing")
	if _, err := settings.Load(src); cay.CodeOf(err) != cay.CodeConfigInvalid {
		t.Errorf("got %v", err)
	}
}

func FuzzFile(f *testing.F) {
	f.Add("pool-size: 3\n")
	f.Add("api-addr: \"")
	f.Fuzz(func(t *testing.T, text string) {
		_, err := settings.Load(sources(t, text, nil, nil))
		if err != nil && cay.CodeOf(err) != cay.CodeConfigInvalid {
			t.Errorf("an untyped error: %v", err)
		}
	})
}

// A data directory that is a file is an error of the data directory, for
// whoever opens it, and not of a configuration file.
func TestDataDirIsAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := settings.Load(sources(t, "", nil, map[string]string{"data-dir": path})); err != nil {
		t.Error(err)
	}
}

func TestRefusedRanges(t *testing.T) {
	s, err := settings.Load(sources(t, "refused-ranges: 192.0.2.7, 198.51.100.9/24,2001:DB8::1/32, ::ffff:203.0.113.5,", nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range s.RefusedRanges {
		got = append(got, p.String())
	}
	if want := []string{"192.0.2.7/32", "198.51.100.0/24", "2001:db8::/32", "203.0.113.5/32"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if s, err := settings.Load(sources(t, "", nil, nil)); err != nil || s.RefusedRanges != nil || s.Mbit != 0 {
		t.Errorf("by default %+v, %v", s, err)
	}
}
