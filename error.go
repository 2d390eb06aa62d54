package cay

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// Layer names the part of the system that failed.
type Layer string

// The layers, from the client inwards.
const (
	LayerAPI       Layer = "api"
	LayerAuth      Layer = "auth"
	LayerQuota     Layer = "quota"
	LayerPlacement Layer = "placement"
	LayerTemplate  Layer = "template"
	LayerStorage   Layer = "storage"
	LayerNetwork   Layer = "network"
	LayerRuntime   Layer = "runtime"
	LayerKernel    Layer = "kernel"
	LayerInit      Layer = "init"
	LayerEnvd      Layer = "envd"
	LayerGuest     Layer = "guest"
	LayerHost      Layer = "host"
)

// Code is a stable name of a failure, for machines. spec/errors.md lists every
// one; a test holds the list and [Codes] together.
type Code string

// The codes.
const (
	CodeInvalidRequest       Code = "invalid_request"
	CodeUnauthorized         Code = "unauthorized"
	CodeForbidden            Code = "forbidden"
	CodeSandboxNotFound      Code = "sandbox_not_found"
	CodeTemplateNotFound     Code = "template_not_found"
	CodeKeyNotFound          Code = "key_not_found"
	CodeNotFound             Code = "not_found"
	CodeConflict             Code = "conflict"
	CodeSandboxTransition    Code = "sandbox_in_transition"
	CodeTooManySandboxes     Code = "too_many_sandboxes"
	CodeNotImplemented       Code = "not_implemented"
	CodeTemplateIncomplete   Code = "template_incomplete"
	CodeTemplateInvalid      Code = "template_invalid"
	CodeTemplateBuild        Code = "template_build_failed"
	CodeObjectMissing        Code = "object_missing"
	CodeObjectCorrupt        Code = "object_corrupt"
	CodeRootfsMismatch       Code = "rootfs_mismatch"
	CodeDiskFull             Code = "disk_full"
	CodeDiskUnavailable      Code = "disk_unavailable"
	CodeNetworkUnavailable   Code = "network_unavailable"
	CodeNoSlot               Code = "no_network_slot"
	CodeCapacity             Code = "sandbox_capacity_unavailable"
	CodePlacementTimeout     Code = "sandbox_placement_timeout"
	CodeEngineUnavailable    Code = "engine_unavailable"
	CodeEngineFailed         Code = "engine_failed"
	CodeInitFailed           Code = "init_failed"
	CodeEnvdUnreachable      Code = "envd_unreachable"
	CodeEnvdInit             Code = "envd_init_failed"
	CodeEnvdUpgrade          Code = "envd_upgrade_failed"
	CodeGuestUnresponsive    Code = "guest_unresponsive"
	CodeGuestProbe           Code = "guest_probe_failed"
	CodeCheckpointFailed     Code = "checkpoint_failed"
	CodeSnapshotIncompatible Code = "snapshot_incompatible"
	CodeSnapshotCorrupt      Code = "snapshot_corrupt"
	CodeGuestOOM             Code = "guest_oom"
	CodeGuestExited          Code = "guest_exited"
	CodePrivilege            Code = "missing_privilege"
	CodePortTaken            Code = "port_taken"
	CodeDataDirLocked        Code = "data_dir_locked"
	CodeDataDirInvalid       Code = "data_dir_invalid"
	CodeConfigInvalid        Code = "config_invalid"
	CodeHostUnsupported      Code = "host_unsupported"
	CodeNotRunning           Code = "server_not_running"
	CodeStoreUnavailable     Code = "store_unavailable"
	CodeShuttingDown         Code = "shutting_down"
	CodeInternal             Code = "internal_server_error"
)

// CodeInfo describes a code.
type CodeInfo struct {
	Code      Code
	Status    int  // HTTP status at the API
	Retryable bool // the same call may succeed later without a change
	Meaning   string
}

// Codes lists every code.
var Codes = []CodeInfo{
	{CodeInvalidRequest, http.StatusBadRequest, false, "The request breaks the API's rules; the message names the field."},
	{CodeUnauthorized, http.StatusUnauthorized, false, "The API key is missing, malformed, unknown or deleted."},
	{CodeForbidden, http.StatusForbidden, false, "The credential is valid but may not do this."},
	{CodeSandboxNotFound, http.StatusNotFound, false, "No such sandbox for this team; it may have ended."},
	{CodeTemplateNotFound, http.StatusNotFound, false, "No such template for this team."},
	{CodeKeyNotFound, http.StatusNotFound, false, "No such API key for this team."},
	{CodeNotFound, http.StatusNotFound, false, "No such path or object."},
	{CodeConflict, http.StatusConflict, false, "The object is not in a state that allows the operation."},
	{CodeSandboxTransition, http.StatusConflict, true, "Another operation on the sandbox is under way."},
	{CodeTooManySandboxes, http.StatusTooManyRequests, true, "The team's limit of concurrent sandboxes is reached."},
	{CodeNotImplemented, http.StatusNotImplemented, false, "This build of Cay does not have the operation."},
	{CodeTemplateIncomplete, http.StatusInternalServerError, false, "A part of the build that its manifest names is missing."},
	{CodeTemplateInvalid, http.StatusInternalServerError, false, "The build's manifest cannot be used by this version."},
	{CodeTemplateBuild, http.StatusInternalServerError, false, "Building the template failed; nothing of it is visible."},
	{CodeObjectMissing, http.StatusInternalServerError, false, "An object is not in the artefact store."},
	{CodeObjectCorrupt, http.StatusInternalServerError, false, "An object's content does not match its digest."},
	{CodeRootfsMismatch, http.StatusInternalServerError, false, "The guest booted another root file system than the one asked for."},
	{CodeDiskFull, http.StatusInsufficientStorage, true, "The host's disk is full."},
	{CodeDiskUnavailable, http.StatusInternalServerError, false, "The sandbox's disk could not be prepared."},
	{CodeNetworkUnavailable, http.StatusInternalServerError, true, "The sandbox's network could not be prepared."},
	{CodeNoSlot, http.StatusServiceUnavailable, true, "Every network slot of the node is in use."},
	{CodeCapacity, http.StatusServiceUnavailable, true, "No node has room for the sandbox."},
	{CodePlacementTimeout, http.StatusGatewayTimeout, true, "The sandbox did not become ready in time."},
	{CodeEngineUnavailable, http.StatusInternalServerError, true, "The engine's supervisor does not answer."},
	{CodeEngineFailed, http.StatusInternalServerError, true, "The engine could not start the guest."},
	{CodeInitFailed, http.StatusInternalServerError, false, "PID 1 of the guest ended or did not come up."},
	{CodeEnvdUnreachable, http.StatusInternalServerError, true, "envd did not answer; the message names the stage that was reached."},
	{CodeEnvdInit, http.StatusInternalServerError, true, "envd refused its configuration."},
	{CodeEnvdUpgrade, http.StatusConflict, true, "envd was not replaced; the one before it runs on."},
	{CodeGuestUnresponsive, http.StatusServiceUnavailable, true, "The daemon in the guest does not answer, and what was asked for needs it; the sandbox runs on."},
	{CodeGuestProbe, http.StatusInternalServerError, false, "The guest is up but a command in it fails."},
	{CodeCheckpointFailed, http.StatusInternalServerError, true, "The guest's memory could not be saved; the sandbox runs on."},
	{CodeSnapshotIncompatible, http.StatusConflict, false, "The snapshot was made by an engine this build does not have."},
	{CodeSnapshotCorrupt, http.StatusInternalServerError, false, "A part of the snapshot is missing or damaged; the message names it."},
	{CodeGuestOOM, http.StatusInternalServerError, false, "The guest used more memory than its limit and was ended."},
	{CodeGuestExited, http.StatusInternalServerError, false, "The guest ended by itself."},
	{CodePrivilege, http.StatusInternalServerError, false, "Cay lacks a privilege it needs on this host."},
	{CodePortTaken, http.StatusInternalServerError, false, "Another process listens on the port."},
	{CodeDataDirLocked, http.StatusInternalServerError, false, "Another server uses the data directory."},
	{CodeDataDirInvalid, http.StatusInternalServerError, false, "The data directory cannot be used."},
	{CodeConfigInvalid, http.StatusInternalServerError, false, "A setting has a wrong value; the message names it and its origin."},
	{CodeHostUnsupported, http.StatusInternalServerError, false, "The host lacks a feature Cay needs; `cay doctor` shows which."},
	{CodeNotRunning, http.StatusServiceUnavailable, true, "No server answers for the data directory."},
	{CodeStoreUnavailable, http.StatusServiceUnavailable, true, "The database does not answer."},
	{CodeShuttingDown, http.StatusServiceUnavailable, true, "The server is going down."},
	{CodeInternal, http.StatusInternalServerError, true, "A defect in Cay; the log has the cause under the request ID."},
}

// Error is a failure that somebody may have to act on.
//
// Message is a sentence for people that says what failed and why; Fix says
// what to do about it. Err, if set, is the cause for the log and for
// [errors.Is]; it is never shown to a client.
type Error struct {
	Code    Code
	Layer   Layer
	Message string
	Fix     string
	// Detail holds evidence: paths, PIDs, sizes, the guest's last console lines.
	Detail map[string]string
	Err    error
}

// Error implements error: layer, code, message and fix on one line.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s [%s/%s]", e.Message, e.Layer, e.Code)
	if e.Fix != "" {
		fmt.Fprintf(&b, " — %s", e.Fix)
	}
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports a match by code, so that errors.Is(err, &cay.Error{Code: c}) works.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && t.Layer == "" && t.Message == ""
}

// CodeOf returns the code of the outermost [*Error] in err's chain, and
// [CodeInternal] if there is none. It returns "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}

// InfoOf returns the description of a code; an unknown code gets that of
// [CodeInternal].
func InfoOf(c Code) CodeInfo {
	for _, i := range Codes {
		if i.Code == c {
			return i
		}
	}
	return InfoOf(CodeInternal)
}
