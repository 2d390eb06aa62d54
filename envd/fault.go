package envd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"syscall"

	"connectrpc.com/connect"
)

// fault is a failure that a client is told about. code decides the Connect
// code and, with status zero, the HTTP status.
type fault struct {
	code   connect.Code
	status int
	msg    string
	err    error
}

func (f *fault) Error() string {
	if f.err != nil {
		return f.msg + ": " + f.err.Error()
	}
	return f.msg
}

func (f *fault) Unwrap() error { return f.err }

func faultf(c connect.Code, format string, args ...any) *fault {
	return &fault{code: c, msg: fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) *fault {
	return faultf(connect.CodeInvalidArgument, format, args...)
}

func notFound(format string, args ...any) *fault {
	return faultf(connect.CodeNotFound, format, args...)
}

// asFault gives every error its code, once, at the edge. Errors of the kernel
// keep their text and get the code of the contract.
func asFault(err error) *fault {
	if f, ok := errors.AsType[*fault](err); ok {
		return f
	}
	f := &fault{code: connect.CodeInternal, msg: err.Error()}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		f.code, f.status, f.msg = connect.CodeResourceExhausted, http.StatusInsufficientStorage, "not enough disk space available: "+err.Error()
	case errors.Is(err, fs.ErrNotExist):
		f.code = connect.CodeNotFound
	case errors.Is(err, syscall.ENOTEMPTY), errors.Is(err, syscall.EBUSY):
		f.code = connect.CodeFailedPrecondition
	case errors.Is(err, fs.ErrExist):
		f.code = connect.CodeAlreadyExists
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		f.code = connect.CodePermissionDenied
	case errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR),
		errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.ETXTBSY):
		f.code = connect.CodeInvalidArgument
	case errors.Is(err, syscall.ELOOP):
		f.code = connect.CodeFailedPrecondition
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		f.code = connect.CodeResourceExhausted
	case errors.Is(err, context.DeadlineExceeded):
		f.code = connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled):
		f.code = connect.CodeCanceled
	}
	return f
}

// rpcError is an error as a Connect handler returns it.
func rpcError(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*connect.Error](err); ok {
		return err
	}
	f := asFault(err)
	return connect.NewError(f.code, errors.New(f.Error()))
}

// statusOf is the HTTP status of a fault on the plain endpoints.
func statusOf(f *fault) int {
	if f.status != 0 {
		return f.status
	}
	switch f.code {
	case connect.CodeInvalidArgument, connect.CodeFailedPrecondition, connect.CodeAlreadyExists:
		return http.StatusBadRequest
	case connect.CodeUnauthenticated:
		return http.StatusUnauthorized
	case connect.CodePermissionDenied:
		return http.StatusForbidden
	case connect.CodeNotFound:
		return http.StatusNotFound
	case connect.CodeResourceExhausted:
		return http.StatusTooManyRequests
	default:
		return http.StatusInternalServerError
	}
}

// writeFault answers a plain request with an error.
func writeFault(w http.ResponseWriter, err error) {
	f := asFault(err)
	writeError(w, statusOf(f), f.Error())
}

// writeError answers {"code":…,"message":…}; the clients read code from the
// body, not from the status.
func writeError(w http.ResponseWriter, status int, msg string) {
	for _, h := range []string{"Content-Encoding", "Content-Disposition", "Content-Length", "Last-Modified", "Etag"} {
		w.Header().Del(h)
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, status, struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{status, msg})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil { // every value here is our own
		status, b = http.StatusInternalServerError, []byte(`{"code":500,"message":"encoding the answer failed"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}
