package envd

import "net/http"

func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	writeError(w, http.StatusNotImplemented, "not yet")
}
