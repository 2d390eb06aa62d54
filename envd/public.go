package envd

import (
	"net/http"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/reflect/protoreflect"

	filesystempb "github.com/cayhq/cay/internal/gen/envd/filesystem"
	"github.com/cayhq/cay/internal/gen/envd/filesystem/filesystemconnect"
	processpb "github.com/cayhq/cay/internal/gen/envd/process"
	"github.com/cayhq/cay/internal/gen/envd/process/processconnect"
)

// maxMessage bounds one message of a client. Larger input is sent in parts.
const maxMessage = 16 << 20

// controlRoutes answer on the control listener only.
var controlRoutes = map[string]bool{
	"/init": true, "/identity": true, "/freeze": true, "/unfreeze": true, "/collapse": true,
	"/fsfreeze": true, "/fsthaw": true, "/upgrade": true,
}

// Public returns the handler of the public listener. Paths are compared as
// they are: nothing is cleaned, so nothing is reached by another spelling.
func (s *Server) Public() http.Handler {
	// Output and events come in small messages, for which compression costs
	// more than it saves, a large buffer each above all.
	opts := []connect.HandlerOption{connect.WithReadMaxBytes(maxMessage), connect.WithCompressMinBytes(64 << 10)}
	_, process := processconnect.NewProcessHandler(&processService{s}, opts...)
	_, filesystem := filesystemconnect.NewFilesystemHandler(&filesystemService{s}, opts...)

	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if crossOrigin(w, r) {
			return
		}
		path := r.URL.Path
		switch {
		case controlRoutes[path]:
			writeError(w, http.StatusNotFound, path+" is reserved for the E2B control plane")
			return
		case path == "/health":
			if allow(w, r, http.MethodGet, http.MethodHead) {
				w.Header().Set("Cache-Control", "no-store")
				w.WriteHeader(http.StatusNoContent)
			}
			return
		case path == "/files":
			if allow(w, r, http.MethodGet, http.MethodHead, http.MethodPost) {
				s.transfers.Add(1)
				defer s.transfers.Add(-1)
				if r.Method == http.MethodPost {
					s.upload(w, r)
				} else {
					s.download(w, r)
				}
			}
			return
		}
		if !s.authorized(r) {
			writeError(w, http.StatusUnauthorized, "unauthorized access, please provide a valid access token or method signing if supported")
			return
		}
		noLimit(r)
		switch {
		case hasMethod(processpb.File_process_process_proto, path):
			process.ServeHTTP(w, r)
		case hasMethod(filesystempb.File_filesystem_filesystem_proto, path):
			filesystem.ServeHTTP(w, r)
		case path == "/files/compose":
			if allow(w, r, http.MethodPost) {
				s.compose(w, r)
			}
		case path == "/metrics":
			if allow(w, r, http.MethodGet, http.MethodHead) {
				s.metrics(w, r)
			}
		case path == "/envs":
			if allow(w, r, http.MethodGet, http.MethodHead) {
				w.Header().Set("Cache-Control", "no-store")
				writeJSON(w, http.StatusOK, s.settings().env)
			}
		default:
			writeError(w, http.StatusNotFound, "no such route: "+path)
		}
	})
}

// hasMethod reports whether a path, /package.Service/Method, names a method of
// a file's services.
func hasMethod(file protoreflect.FileDescriptor, path string) bool {
	service, method, ok := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	name, ok2 := strings.CutPrefix(service, string(file.Package())+".")
	if !ok || !ok2 || path == "" || path[0] != '/' {
		return false
	}
	s := file.Services().ByName(protoreflect.Name(name))
	return s != nil && s.Methods().ByName(protoreflect.Name(method)) != nil
}

// noLimit gives the timeout 0 the meaning it has for the clients, none.
// Connect's own handlers would take it for a deadline that has passed.
func noLimit(r *http.Request) {
	if n, err := strconv.ParseInt(r.Header.Get(headerTimeout), 10, 64); err == nil && n == 0 {
		r.Header.Del(headerTimeout)
	}
}

// allow answers a request whose method the route does not have.
func allow(w http.ResponseWriter, r *http.Request, methods ...string) bool {
	for _, m := range methods {
		if r.Method == m {
			return true
		}
	}
	w.Header().Set("Allow", strings.Join(methods, ", "))
	writeError(w, http.StatusMethodNotAllowed, "method "+r.Method+" is not allowed")
	return false
}

// exposed are the headers that scripts of other origins may read.
const exposed = "Content-Encoding, Connect-Content-Encoding, Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin, Location, Cache-Control, X-Content-Type-Options"

// crossOrigin allows every origin and answers preflights. The token, not the
// origin, is what guards a sandbox.
func crossOrigin(w http.ResponseWriter, r *http.Request) bool {
	h := w.Header()
	if r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != "" {
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Allow-Methods", "HEAD, GET, POST, PUT, PATCH, DELETE")
		// A star would not cover Authorization, so the wish is repeated.
		if want := r.Header.Get("Access-Control-Request-Headers"); want != "" {
			h.Set("Access-Control-Allow-Headers", want)
		} else {
			h.Set("Access-Control-Allow-Headers", "*")
		}
		h.Add("Vary", "Access-Control-Request-Headers")
		h.Set("Access-Control-Max-Age", "7200")
		w.WriteHeader(http.StatusNoContent)
		return true
	}
	if r.Header.Get("Origin") != "" {
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Expose-Headers", exposed)
	}
	return false
}
