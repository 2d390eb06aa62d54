package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/go-chi/chi/v5"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

// handlers implements the generated interface of the public API, by topic.
type handlers struct {
	sandboxHandlers
	templateHandlers
	keyHandlers
	secretHandlers
	adminHandlers
	absentHandlers
}

var (
	_ gen.StrictServerInterface      = handlers{}
	_ operator.StrictServerInterface = operatorHandlers{}
)

// Handler returns the whole API. It may be used without [Server.Serve].
func (s *Server) Handler() http.Handler {
	s.init()
	r := chi.NewRouter()
	r.NotFound(func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerAPI,
			Message: fmt.Sprintf("the API has no path %s", r.URL.Path),
			Fix:     "check E2B_API_URL and the path; spec/openapi.yaml lists every one"})
	})
	r.MethodNotAllowed(func(w http.ResponseWriter, r *http.Request) { s.methodNotAllowed(w, r) })

	paramError := func(w http.ResponseWriter, r *http.Request, err error) { s.fail(w, r, badParameter(err)) }
	bodyError := func(w http.ResponseWriter, r *http.Request, err error) { s.fail(w, r, badBody(err)) }

	public := mustDocument(gen.GetSpec())
	h := handlers{sandboxHandlers{s}, templateHandlers{s}, keyHandlers{s}, secretHandlers{s}, adminHandlers{s}, absentHandlers{s}}
	gen.HandlerWithOptions(gen.NewStrictHandlerWithOptions(h, nil, gen.StrictHTTPServerOptions{
		RequestErrorHandlerFunc: bodyError, ResponseErrorHandlerFunc: s.fail,
	}), gen.ChiServerOptions{BaseRouter: r.With(s.guard(public)), ErrorHandlerFunc: paramError})

	private := mustDocument(operator.GetSpec())
	operator.HandlerWithOptions(operator.NewStrictHandlerWithOptions(operatorHandlers{s}, nil, operator.StrictHTTPServerOptions{
		RequestErrorHandlerFunc: bodyError, ResponseErrorHandlerFunc: s.fail,
	}), operator.ChiServerOptions{BaseRouter: r.With(s.guard(private)), ErrorHandlerFunc: paramError})
	return s.outer(cors(r))
}

// mustDocument is for the embedded documents, which a test loads.
func mustDocument(doc *openapi3.T, err error) *openapi3.T {
	if err != nil {
		panic(fmt.Sprintf("the embedded OpenAPI document does not load: %v", err))
	}
	return doc
}

// methodNotAllowed answers a known path with another method. There is no code
// of ours for it: the status says all.
func (s *Server) methodNotAllowed(w http.ResponseWriter, r *http.Request) {
	writeFault(w, http.StatusMethodNotAllowed, &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerAPI,
		Message: fmt.Sprintf("the path %s does not take %s", r.URL.Path, r.Method),
		Fix:     "use the method that spec/openapi.yaml names"}, requestID(r.Context()))
}

// guard authenticates and validates the requests of one document. It runs when
// the route is known, before any parameter is read.
func (s *Server) guard(doc *openapi3.T) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rctx := chi.RouteContext(r.Context())
			path := rctx.RoutePattern()
			item := doc.Paths.Value(path)
			op := item.GetOperation(r.Method)
			if strings.HasPrefix(path, "/secrets") {
				w.Header().Set("Cache-Control", "no-store") // e2b.md 1.4, Secrets
			}
			c, err := s.authenticate(r, acceptsOf(doc, op))
			if err != nil {
				s.fail(w, r, err)
				return
			}
			params := map[string]string{}
			for i, name := range rctx.URLParams.Keys {
				if params[name], err = url.PathUnescape(rctx.URLParams.Values[i]); err != nil {
					s.fail(w, r, invalid("the path is not encoded well: %v", "encode it as RFC 3986 says", err))
					return
				}
			}
			err = validate(r, params, &routers.Route{Spec: doc, Path: path, PathItem: item, Method: r.Method, Operation: op})
			if err != nil {
				s.fail(w, r, err)
				return
			}
			if unbounded(r) {
				if err := unbind(w); err != nil {
					s.fail(w, r, err)
					return
				}
			}
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), keyCaller, c)))
		})
	}
}

// validate holds a request against the document.
func validate(r *http.Request, params map[string]string, route *routers.Route) error {
	if route.Operation.RequestBody != nil && r.Header.Get("Content-Type") == "" {
		r.Header.Set("Content-Type", "application/json")
	}
	err := openapi3filter.ValidateRequest(r.Context(), &openapi3filter.RequestValidationInput{
		Request: r, PathParams: params, Route: route,
		Options: &openapi3filter.Options{SkipSettingDefaults: true, ExcludeRequestBody: unbounded(r), AuthenticationFunc: openapi3filter.NoopAuthenticationFunc},
	})
	if err == nil {
		return nil
	}
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return err
	}
	e := describe(err, r)
	e.Err = err
	return e
}

// describe says in words what is wrong with a request, and names the field.
func describe(err error, r *http.Request) *cay.Error {
	var re *openapi3filter.RequestError
	if !errors.As(err, &re) {
		return invalid("the request is not what the API expects: %v", "compare it with spec/openapi.yaml", err)
	}
	what, fix := "the request body", "compare it with spec/openapi.yaml"
	if re.Parameter != nil {
		what = fmt.Sprintf("the parameter %q", re.Parameter.Name)
	}
	var se *openapi3.SchemaError
	var pe *openapi3filter.ParseError
	switch {
	case errors.As(err, &se):
		path := slices.DeleteFunc(se.JSONPointer(), func(s string) bool { return s == "" })
		if len(path) > 0 && re.Parameter == nil {
			what = fmt.Sprintf("the field %q", strings.Join(path, "."))
		}
		if se.SchemaField == "required" {
			return invalid("%s is missing", fix, what)
		}
		return invalid("%s is wrong: %s", fix, what, se.Reason)
	case errors.Is(err, openapi3filter.ErrInvalidRequired) && re.Parameter == nil:
		return invalid("the request has no body", "send a JSON object")
	case errors.Is(err, openapi3filter.ErrInvalidRequired):
		return invalid("%s is missing", fix, what)
	case errors.As(err, &pe) && pe.Kind == openapi3filter.KindUnsupportedFormat,
		strings.HasPrefix(re.Reason, "header Content-Type"):
		return invalid("the Content-Type %q is not understood", "send the body as application/json", r.Header.Get("Content-Type"))
	case errors.As(err, &pe) && re.Parameter == nil:
		return invalid("the request body is not JSON: %v", "send a JSON object", pe.RootCause())
	case errors.As(err, &pe):
		return invalid("%s is wrong: %s", fix, what, pe.Reason)
	}
	return invalid("%s is wrong: %s", fix, what, re.Reason)
}

// badParameter is for parameters that the document lets pass and Go's types
// don't.
func badParameter(err error) error {
	var format *gen.InvalidParamFormatError
	if errors.As(err, &format) {
		return invalid("the parameter %q is wrong: %v", "compare it with spec/openapi.yaml", format.ParamName, format.Err)
	}
	return invalid("a parameter is wrong: %v", "compare it with spec/openapi.yaml", err)
}

// badBody is for bodies that the document lets pass and Go's types don't.
func badBody(err error) error {
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return err
	}
	return invalid("the request body is wrong: %v", "compare it with spec/openapi.yaml", err)
}
