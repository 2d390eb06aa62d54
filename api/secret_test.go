package api

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/keyring"
	"github.com/cayhq/cay/store"
)

func (f *fixture) secrets() Secrets { return Secrets{f.store, f.s.Sealer} }

func TestSecretLife(t *testing.T) {
	f := newFixture(t)
	const one, two = "canary-value-one", "canary-value-two"
	var made gen.Secret
	a := f.want(201, f.request("POST", "/secrets", `{"name":"OpenAI-Key","value":"`+one+`","metadata":{"team":"a","x":""}}`))
	a.decode(t, &made)
	if !strings.HasPrefix(made.SecretID, "sec_") || made.Name != "openai-key" || made.CurrentVersion != 1 || made.Metadata["team"] != "a" ||
		made.CreatedAt.IsZero() || !made.UpdatedAt.Equal(made.CreatedAt) {
		t.Errorf("made %+v", made)
	}
	if got := a.header.Get("Cache-Control"); got != "no-store" {
		t.Errorf("Cache-Control is %q", got)
	}
	value := func(name string) string {
		v, err := f.secrets().Value(t.Context(), f.team.ID, name)
		if err != nil {
			t.Fatal(err)
		}
		return v.Reveal()
	}
	if got := value("OPENAI-key"); got != one {
		t.Errorf("the value is %q", got)
	}
	f.want(409, f.request("POST", "/secrets", `{"name":"OPENAI-KEY","value":"x"}`))

	var got gen.Secret
	for _, ref := range []string{made.SecretID, "openai-key", "OpenAI-KEY"} {
		f.want(200, f.request("GET", "/secrets/"+ref, "")).decode(t, &got)
		if got.SecretID != made.SecretID {
			t.Errorf("%s is %+v", ref, got)
		}
	}
	f.want(200, f.request("POST", "/secrets/openai-key", `{"value":"`+two+`"}`)).decode(t, &got)
	if got.CurrentVersion != 2 || got.Metadata["team"] != "a" || got.UpdatedAt.Before(made.UpdatedAt) || !got.CreatedAt.Equal(made.CreatedAt) {
		t.Errorf("updated %+v", got)
	}
	if got := value("openai-key"); got != two {
		t.Errorf("after the update the value is %q", got)
	}
	got = gen.Secret{}
	f.want(200, f.request("POST", "/secrets/"+made.SecretID, `{"value":"`+two+`","metadata":{}}`)).decode(t, &got)
	if got.CurrentVersion != 3 || len(got.Metadata) != 0 {
		t.Errorf("updated %+v", got)
	}

	// Another server over the same store and keys, as after a restart.
	f.serve(nil)
	if got := value("openai-key"); got != two {
		t.Errorf("after a restart the value is %q", got)
	}

	// Another team: the same name is another secret, and nothing of ours is there.
	if _, err := f.secrets().Value(t.Context(), f.other.ID, "openai-key"); cay.CodeOf(err) != cay.CodeNotFound {
		t.Errorf("another team gets the value: %v", err)
	}
	foreign := []string{"X-API-Key", f.foreign}
	for _, r := range [][2]string{{"GET", ""}, {"POST", `{"value":"x"}`}, {"DELETE", ""}} {
		f.want(404, f.request(r[0], "/secrets/"+made.SecretID, r[1], foreign...))
		f.want(404, f.request(r[0], "/secrets/openai-key", r[1], foreign...))
	}
	f.want(201, f.request("POST", "/secrets", `{"name":"openai-key","value":"theirs"}`, foreign...))
	if got := value("openai-key"); got != two {
		t.Errorf("after another team's create the value is %q", got)
	}

	f.want(204, f.request("DELETE", "/secrets/openai-key", ""))
	f.want(404, f.request("DELETE", "/secrets/openai-key", ""))
	f.want(404, f.request("GET", "/secrets/"+made.SecretID, ""))
	if _, err := f.secrets().Value(t.Context(), f.team.ID, "openai-key"); cay.CodeOf(err) != cay.CodeNotFound {
		t.Errorf("after its end the value is there: %v", err)
	}
}

func TestSecretRefusals(t *testing.T) {
	f := newFixture(t)
	pairs := func(n, key, value int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `%q:%q,`, fmt.Sprint(i)+strings.Repeat("k", key-len(fmt.Sprint(i))), strings.Repeat("v", value))
		}
		return "{" + strings.TrimSuffix(b.String(), ",") + "}"
	}
	for _, tc := range []struct {
		body string
		want int
	}{
		{`{"name":"","value":"x"}`, 400},
		{`{"name":"a b","value":"x"}`, 400},
		{`{"name":"a.b","value":"x"}`, 400},
		{`{"name":"ä","value":"x"}`, 400},
		{`{"name":"` + strings.Repeat("a", 129) + `","value":"x"}`, 400},
		{`{"name":"` + strings.Repeat("a", 128) + `","value":"x"}`, 201},
		{`{"name":"sec_mine","value":"x"}`, 400},
		{`{"name":"SEC_mine","value":"x"}`, 400},
		{`{"name":"secmine","value":"x"}`, 201},
		{`{"value":"x"}`, 400},
		{`{"name":"n1"}`, 400},
		{`{"name":"n1","value":""}`, 400},
		{`{"name":"n1","value":7}`, 400},
		{`{"name":"n1","value":"` + strings.Repeat("x", maxSecretValue) + `"}`, 201},
		{`{"name":"n2","value":"` + strings.Repeat("x", maxSecretValue+1) + `"}`, 400},
		{`{"name":"n2","value":"x","metadata":` + pairs(33, 3, 1) + `}`, 400},
		{`{"name":"n2","value":"x","metadata":` + pairs(32, 3, 1) + `}`, 201},
		{`{"name":"n3","value":"x","metadata":` + pairs(1, 129, 1) + `}`, 400},
		{`{"name":"n3","value":"x","metadata":` + pairs(1, 128, 1024) + `}`, 201},
		{`{"name":"n4","value":"x","metadata":` + pairs(1, 3, 1025) + `}`, 400},
		{`{"name":"n4","value":"x","metadata":` + pairs(8, 3, 1022) + `}`, 400},
		{`{"name":"n4","value":"x","metadata":` + pairs(8, 2, 1022) + `}`, 201},
		{`{"name":"n5","value":"x","metadata":{"":"x"}}`, 400},
	} {
		a := f.request("POST", "/secrets", tc.body)
		if a.status != tc.want {
			t.Errorf("%.80s: %d, want %d: %s", tc.body, a.status, tc.want, a.body)
		}
		if a.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%.80s: the answer may be kept", tc.body)
		}
	}
	f.s.Sealer = nil
	for _, r := range [][3]string{{"GET", "/secrets", ""}, {"POST", "/secrets", `{"name":"a","value":"b"}`}, {"GET", "/secrets/n1", ""},
		{"POST", "/secrets/n1", `{"value":"b"}`}, {"DELETE", "/secrets/n1", ""}} {
		f.want(403, f.request(r[0], r[1], r[2]))
	}
}

func TestSecretPages(t *testing.T) {
	f := newFixture(t)
	for i := range 5 {
		f.want(201, f.request("POST", "/secrets", fmt.Sprintf(`{"name":"s%d","value":"x"}`, i)))
	}
	var names []string
	token := ""
	for range 4 {
		a := f.want(200, f.request("GET", "/secrets?limit=2&nextToken="+token, ""))
		var page []gen.Secret
		a.decode(t, &page)
		for _, s := range page {
			names = append(names, s.Name)
		}
		if token = a.header.Get("X-Next-Token"); token == "" {
			break
		}
	}
	if got := strings.Join(names, " "); got != "s4 s3 s2 s1 s0" {
		t.Errorf("the pages have %s", got)
	}
	f.want(400, f.request("GET", "/secrets?nextToken=x", ""))
	f.want(400, f.request("GET", "/secrets?limit=101", ""))
}

// A value is in no answer, log or file, whatever is done with it.
func TestSecretIsNowhere(t *testing.T) {
	f := newFixture(t)
	f.s.Log = slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	const canary = "canary-4c0f9b"
	var said bytes.Buffer
	for _, r := range [][3]string{
		{"POST", "/secrets", `{"name":"a","value":"` + canary + `"}`},
		{"POST", "/secrets", `{"name":"a","value":"` + canary + `"}`},                   // conflict
		{"POST", "/secrets", `{"name":"a b","value":"` + canary + `"}`},                 // a wrong name
		{"POST", "/secrets", `{"name":"b","value":["` + canary + `"]}`},                 // a wrong type
		{"POST", "/secrets", `{"name":"b","value":"` + canary + `"`},                    // no JSON
		{"POST", "/secrets", `{"name":"b","value":"` + canary + `","metadata":[true]}`}, // another field is wrong
		{"POST", "/secrets", `{"name":"b","value":"` + strings.Repeat(canary, 1<<13) + `"}`},
		{"POST", "/secrets/a", `{"value":"` + canary + `"}`}, {"POST", "/secrets/none", `{"value":"` + canary + `"}`},
		{"GET", "/secrets", ""}, {"GET", "/secrets/a", ""},
	} {
		a := f.request(r[0], r[1], r[2])
		fmt.Fprintln(&said, a.status, a.header, a.body)
	}
	id, data, err := f.s.Sealer.Seal("x", canary)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.s.Sealer.Open("y", id, data)
	fmt.Fprintln(&said, err)
	for what, text := range map[string]string{"an answer or an error": said.String(), "the log": f.log.String()} {
		if strings.Contains(text, canary) {
			t.Errorf("the value is in %s: %s", what, text)
		}
	}
	files, _ := filepath.Glob(filepath.Join(f.dir, "*"))
	if len(files) < 2 {
		t.Fatalf("only %v are in the directory", files)
	}
	for _, name := range files {
		if b, err := os.ReadFile(name); err != nil || bytes.Contains(b, []byte(canary)) {
			t.Errorf("the value is in %s (%v)", name, err)
		}
	}
}

// A new key takes over what older ones have sealed, and a sealed value that was
// moved in the store opens nowhere.
func TestSecretKeys(t *testing.T) {
	f := newFixture(t)
	for _, name := range []string{"a", "b"} {
		f.want(201, f.request("POST", "/secrets", `{"name":"`+name+`","value":"value of `+name+`"}`))
	}
	ring, err := keyring.Open(filepath.Join(f.dir, "keys.json"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	added, err := ring.Add()
	if err != nil {
		t.Fatal(err)
	}
	defer f.run()()
	for _, name := range []string{"a", "b"} {
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
			n, v, err := f.store.FindSecret(t.Context(), f.team.ID, name)
			if err != nil {
				t.Fatal(err)
			}
			if v.Key == added {
				if n.Version != 1 {
					t.Errorf("sealing anew made version %d", n.Version)
				}
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s is still under %s", name, v.Key)
			}
		}
		if v, err := f.secrets().Value(t.Context(), f.team.ID, name); err != nil || v.Reveal() != "value of "+name {
			t.Errorf("%s under the new key: %q, %v", name, v.Reveal(), err)
		}
	}
	_, b, err := f.store.FindSecret(t.Context(), f.team.ID, "b")
	if err != nil {
		t.Fatal(err)
	}
	moved := store.Secret{ID: cay.NewSecretID(), Team: f.other.ID, Name: "b", Version: 1}
	if err := f.store.AddSecret(t.Context(), moved, b); err != nil {
		t.Fatal(err)
	}
	if v, err := f.secrets().Value(t.Context(), f.other.ID, "b"); cay.CodeOf(err) != cay.CodeObjectCorrupt {
		t.Errorf("a value moved to another team opens there: %q, %v", v.Reveal(), err)
	}
}
