package main

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPauseTargets(t *testing.T) {
	ms := func(p50 float64) Summary { return Summary{Unit: "ms", P50: p50} }
	o := outcome{
		series: map[string]Summary{
			pauseBareReady: ms(200), pauseBareRun: ms(1), pauseBareDisk: ms(1505),
			pauseIdle: ms(140), pauseSmall: ms(500), pauseFlushed: ms(290), pauseWritten: ms(290.5),
			resumeIdle: ms(100.25), resumeSmall: ms(150), resumeLarge: ms(380.4), resumeFlushed: ms(90), resumeWritten: ms(300),
			forkOne: ms(120.3), forkMany: ms(1444.8),
			stoppedIdle: ms(9999), stoppedSmall: ms(9999), heldIdle: ms(100.1), heldSmall: ms(119.2), heldNot: ms(9999),
		},
		figures: map[string]Figure{pausedProcesses: {0, ""}, pausedMemory: {0.1, "MB"}, pausedGrowth: {5, "MB"}},
	}
	want := []Target{
		{Name: pauseIdle + " ÷ " + pauseBareReady, Value: 0.7, Limit: 0.7, Unit: "×", Met: true, Required: true},
		{Name: heldIdle + ": p50", Value: 100.1, Limit: 100, Unit: "ms", Required: true},
		{Name: heldSmall + ": p50", Value: 119.2, Limit: 119.2, Unit: "ms", Met: true, Required: true},
		{Name: resumeIdle + " ÷ " + pauseBareReady, Value: 0.501, Limit: 0.5, Unit: "×", Required: true},
		{Name: "resume, for each MB dirty", Value: 1.2, Limit: 1.2, Unit: "ms/MB", Met: true, Required: true},
		{Name: pauseFlushed + " − idle", Value: 150, Limit: 150, Unit: "ms", Met: true, Required: true},
		{Name: resumeFlushed + " − idle", Value: -10.25, Limit: 150, Unit: "ms", Met: true, Required: true},
		{Name: pauseWritten + " − idle", Value: 150.5, Limit: 150, Unit: "ms"},
		{Name: resumeWritten + " − idle", Value: 199.75, Limit: 150, Unit: "ms"},
		{Name: "(" + pauseWritten + " − idle) ÷ " + pauseBareDisk, Value: 0.1, Limit: 0.25, Unit: "×", Met: true},
		{Name: forkOne + " ÷ " + resumeIdle, Value: 1.2, Limit: 1.2, Unit: "×", Met: true, Required: true},
		{Name: forkMany + " ÷ " + forkOne, Value: 12.01, Limit: 12, Unit: "×", Required: true},
		{Name: pausedProcesses, Value: 0, Limit: 0, Met: true, Required: true},
		{Name: pausedMemory, Value: 0.1, Limit: 0, Unit: "MB", Required: true},
	}
	if diff := cmp.Diff(want, judge(o)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	delete(o.series, resumeSmall) // a slope has two ends
	for _, x := range pauseTargets(o) {
		if strings.Contains(x.Name, "MB dirty") && x.Unit == "ms/MB" {
			t.Errorf("without the smaller of two sizes there is %v", x)
		}
	}
}

func TestPausedFigures(t *testing.T) {
	got := pausedFigures(share{processes: 40, memory: 160e6, server: 60e6}, share{processes: 1, memory: 5e6, server: 65e6}, 10)
	want := map[string]Figure{pausedProcesses: {0.1, ""}, pausedMemory: {0.5, "MB"}, pausedGrowth: {0.5, "MB"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if f := pausedFigures(share{server: 60e6}, share{server: 50e6}, 10)[pausedGrowth]; f.Value != 0 {
		t.Errorf("a server that has shrunk has grown by %v", f)
	}
}

// Heavy rounds are as many as asked for, none far from the next.
func TestIsHeavy(t *testing.T) {
	for _, c := range []struct{ rounds, heavy, want int }{{100, 10, 10}, {10, 3, 3}, {3, 3, 3}, {2, 10, 2}, {7, 5, 5}, {1, 1, 1}} {
		n, light, longest := 0, 0, 0
		for i := range c.rounds {
			if isHeavy(i, c.rounds, c.heavy) {
				n, light = n+1, 0
				continue
			}
			light++
			longest = max(longest, light)
		}
		if n != c.want || longest > (c.rounds+c.heavy-1)/c.heavy {
			t.Errorf("of %d rounds %d are heavy, with up to %d light ones between; want %d", c.rounds, n, longest, c.want)
		}
	}
}

// fakeAPI answers every request with the same text, and keeps what it was asked.
func fakeAPI(t *testing.T, answer string) (*client, *[]string) {
	t.Helper()
	var asked []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // a short one is seen in what was asked
		asked = append(asked, r.Method+" "+r.URL.Path+" "+string(body)+" "+r.Header.Get("E2b-Sandbox-Port"))
		_, _ = io.WriteString(w, answer) // its reader would see an error
	}))
	t.Cleanup(srv.Close)
	return &client{http: srv.Client(), api: srv.URL, proxy: srv.URL, key: "k"}, &asked
}

// What was made is returned beside the failure, so that it can be killed.
func TestFork(t *testing.T) {
	for _, c := range []struct {
		name, answer string
		count        int
		made         []box
		err          string
	}{
		{"all made", `[{"sandbox":{"sandboxID":"a","envdAccessToken":"t"}},{"sandbox":{"sandboxID":"b"}}]`, 2, []box{{"a", "t"}, {ID: "b"}}, ""},
		{"one failed", `[{"sandbox":{"sandboxID":"a"}},{"error":{"code":500,"message":"no room"}}]`, 2, []box{{ID: "a"}}, "no room"},
		{"one missing", `[{"sandbox":{"sandboxID":"a"}}]`, 2, []box{{ID: "a"}}, "2 forks were asked for, 1 were made"},
	} {
		cl, asked := fakeAPI(t, c.answer)
		made, err := cl.fork(context.Background(), box{ID: "s"}, c.count)
		if diff := cmp.Diff(c.made, made); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, want %q", c.name, err, c.err)
		}
		if want := []string{`POST /sandboxes/s/fork {"count":2,"timeout":3600} `}; !cmp.Equal(want, *asked) {
			t.Errorf("%s: asked %q", c.name, *asked)
		}
	}
}

func TestSnapshotIsRemoved(t *testing.T) {
	cl, asked := fakeAPI(t, `{"snapshotID":"x:default"}`)
	if err := cl.snapshot(context.Background(), box{ID: "s"}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"POST /sandboxes/s/snapshots {} ", "DELETE /templates/x:default  "}, *asked); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestGap(t *testing.T) {
	cl, asked := fakeAPI(t, "12.625")
	if ms, first, err := cl.gap(context.Background(), box{ID: "s"}); ms != 12.625 || first.IsZero() || err != nil {
		t.Errorf("got %v ms at %v, %v", ms, first, err)
	}
	if diff := cmp.Diff([]string{"GET /gap  7004"}, *asked); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	cl, _ = fakeAPI(t, "what")
	if ms, _, err := cl.gap(context.Background(), box{ID: "s"}); err == nil {
		t.Errorf("an answer that is no number is %v ms", ms)
	}
}
