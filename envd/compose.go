package envd

import "net/http"

func (s *Server) compose(w http.ResponseWriter, r *http.Request) {
	writeError(w, http.StatusNotImplemented, "not yet")
}
