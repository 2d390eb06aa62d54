package cli

import (
	"encoding/json"
	"net/http"

	"github.com/cayhq/cay/internal/gen/operator"
)

// teamHandlers answers what is about teams: one, whose limits can be changed.
func (f *fakeServer) teamHandlers(m *http.ServeMux, admin func(http.HandlerFunc) http.HandlerFunc) {
	team := func() operator.Team {
		l := operator.TeamLimits{Sandboxes: 200, Hours: 24}
		if f.team != nil {
			l = *f.team
		}
		return operator.Team{TeamID: fakeTeam, Name: "Default", Slug: "default", Limits: l}
	}
	m.HandleFunc("GET /operator/v1/teams", admin(func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 200, []operator.Team{team()})
	}))
	m.HandleFunc("PATCH /operator/v1/teams/{id}/limits", admin(func(w http.ResponseWriter, r *http.Request) {
		var u operator.TeamLimitsChange
		t := team()
		if err := json.NewDecoder(r.Body).Decode(&u); err != nil || r.PathValue("id") != fakeTeam || u.Sandboxes != nil {
			refuse(w, 400, "invalid_request", "api", "the request body has a value that is too small", "compare it with spec/operator.yaml")
			return
		}
		for to, from := range map[*int]*int{&t.Limits.Connections: u.Connections, &t.Limits.ConnectionsPerSecond: u.ConnectionsPerSecond, &t.Limits.Mbit: u.Mbit, &t.Limits.Hours: u.Hours} {
			if from != nil {
				*to = *from
			}
		}
		f.team = &t.Limits
		reply(w, 200, t)
	}))
}
