package pause

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

// Sandboxes end over some time, and in the middle the server is killed and
// started anew. None ends early; of a hundred, 99 end within half a second, and
// those that were due meanwhile within two seconds of the start. (Five hundred
// of them, and steps of the wall clock, are in api.TestManyDeadlines, where
// sandboxes cost nothing.)
func TestDeadlines(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	boxes, over := program.Sized(4, 40), time.Duration(program.Sized(4, 60))*time.Second
	type end struct {
		id string
		at time.Time
	}
	var ends []end
	for range boxes {
		ends = append(ends, end{id: c.Make(t, time.Hour, nil).ID})
	}
	first := 2 * time.Second
	for i, e := range ends {
		left := first + over*time.Duration(i)/time.Duration(boxes)
		if err := c.Call(t.Context(), "POST", "/sandboxes/"+e.id+"/timeout", map[string]any{"timeout": int(left / time.Second)}, nil); err != nil {
			t.Fatal(err)
		}
		s, err := c.Get(t.Context(), e.id)
		if err != nil {
			t.Fatal(err)
		}
		ends[i].at = s.EndAt
	}
	time.Sleep(first + over/2)
	server.Kill9(t)
	down := time.Now()
	c.Vanish()
	server.Up(t)
	up := time.Now()
	var late []time.Duration
	for i, e := range ends {
		var r program.Record
		program.Eventually(t, time.Minute+over, func() string {
			var err error
			if r, err = c.Record(t.Context(), e.id); err != nil || r.EndedAt == nil {
				return fmt.Sprintf("sandbox %d has not ended: %v, %+v", i, err, r)
			}
			return ""
		})
		d := r.EndedAt.Sub(e.at)
		switch {
		case d < 0 || r.EndReason != "timeout":
			t.Errorf("sandbox %d ended %v after its time, because of %s", i, d, r.EndReason)
		case e.at.After(down.Add(-2*time.Second)) && e.at.Before(up):
			if after := r.EndedAt.Sub(up); after > 2*time.Second {
				t.Errorf("sandbox %d was due while no server ran, and ended %v after the start of the next", i, after)
			}
		default:
			late = append(late, d)
		}
	}
	slices.Sort(late)
	p99, want := late[len(late)*99/100], time.Duration(program.Sized(2000, 500))*time.Millisecond // other tests may have the processors
	t.Logf("of %d deadlines, half were met within %v, 99 of 100 within %v", len(late), late[len(late)/2], p99)
	if p99 > want {
		t.Errorf("99 of 100 ended within %v of their deadline, want %v", p99, want)
	}
}
