package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
)

// fail answers a request with an error. It is the one place where errors become
// HTTP. What is not a [*cay.Error] is a defect: its text goes to the log, not
// to the client.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := s.known(err)
	status := cay.InfoOf(e.Code).Status
	switch {
	case errors.Is(r.Context().Err(), context.Canceled):
		s.Log.Debug("request of a client that went away failed", "request", requestID(r.Context()), "error", err)
	case status >= http.StatusInternalServerError && e.Code != cay.CodeNotImplemented:
		s.Log.Error("request failed", "request", requestID(r.Context()), "method", r.Method, "path", r.URL.Path,
			"status", status, "code", e.Code, "error", err)
	}
	writeFault(w, status, e, requestID(r.Context()))
}

// known finds the error that a client may see.
func (s *Server) known(err error) *cay.Error {
	var e *cay.Error
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(err, &large):
		return invalid("the request body is larger than %d bytes", "send less", large.Limit)
	case errors.Is(err, context.Canceled) && s.draining.Load():
		return errShuttingDown
	case errors.Is(err, context.DeadlineExceeded):
		return &cay.Error{Code: cay.CodePlacementTimeout, Layer: cay.LayerAPI,
			Message: fmt.Sprintf("the request took longer than %s", handlerTimeout), Fix: "look at the machine's load, and try again"}
	case errors.Is(err, context.Canceled):
		return &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerAPI,
			Message: "the client closed the connection", Fix: "try again"}
	}
	return &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerAPI, Message: "something went wrong inside Cay",
		Fix: "look for the request ID in the server's log, and report it"}
}

// explain is the error body of one result among several.
func (s *Server) explain(ctx context.Context, err error) gen.Error {
	e := s.known(err)
	status := cay.InfoOf(e.Code).Status
	if status >= http.StatusInternalServerError {
		s.Log.Error("a part of a request failed", "request", requestID(ctx), "code", e.Code, "error", err)
	}
	return fault(status, e, requestID(ctx))
}

// fault makes the error body. Message holds everything, because the SDKs show
// nothing else.
func fault(status int, e *cay.Error, id string) gen.Error {
	body := gen.Error{Code: int32(status), Message: faultText(e, id)}
	code, layer := string(e.Code), string(e.Layer)
	body.ErrorCode, body.Layer, body.RequestID = &code, &layer, &id
	if e.Fix != "" {
		body.Fix = &e.Fix
	}
	return body
}

// writeFault writes the error body.
func writeFault(w http.ResponseWriter, status int, e *cay.Error, id string) {
	b, err := json.Marshal(fault(status, e, id))
	if err != nil { // strings and an int
		panic(err)
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", fmt.Sprint(len(b)+1))
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // the client may be gone
}

// faultText is what failed and why, what to do, and which request it was.
func faultText(e *cay.Error, id string) string {
	var b strings.Builder
	b.WriteString(strings.TrimRight(e.Message, ". "))
	b.WriteString(".")
	if e.Fix != "" {
		first, n := utf8.DecodeRuneInString(e.Fix)
		fmt.Fprintf(&b, " %c%s.", unicode.ToUpper(first), strings.TrimRight(e.Fix[n:], ". "))
	}
	if id != "" {
		fmt.Fprintf(&b, " [%s]", id)
	}
	return b.String()
}

var errShuttingDown = &cay.Error{Code: cay.CodeShuttingDown, Layer: cay.LayerAPI,
	Message: "the server is going down", Fix: "try again when it is up"}

// invalid returns an error about the request itself. The message names the
// field; args are for the message.
func invalid(message, fix string, args ...any) *cay.Error {
	return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerAPI, Message: fmt.Sprintf(message, args...), Fix: fix}
}

// absent returns the error of something that this build does not have.
func absent(what, instead string) *cay.Error {
	return &cay.Error{Code: cay.CodeNotImplemented, Layer: cay.LayerAPI,
		Message: "this build of Cay (" + cay.Version + ") does not have " + what, Fix: instead}
}

// errNoSandbox is the one answer for a sandbox that ended, never was, or is
// another team's.
func errNoSandbox(id cay.SandboxID) *cay.Error {
	return &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerAPI,
		Message: fmt.Sprintf("sandbox '%s' was not found: it has ended, or it never was one of your team's", id),
		Fix:     "see `cay sandbox list` for those that run, or create a new one"}
}

// errNoTemplate is the one answer for a template that is not there or is
// another team's.
func errNoTemplate(ref string) *cay.Error {
	return &cay.Error{Code: cay.CodeTemplateNotFound, Layer: cay.LayerTemplate,
		Message: fmt.Sprintf("template '%s' not found", ref),
		Fix:     "see `cay template list` for those you may use"}
}
