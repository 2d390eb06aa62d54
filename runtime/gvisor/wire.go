package gvisor

import (
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// Protocol is the number of the protocol between server and supervisor. It
// rises when an older peer would misunderstand a newer one; GET /hello and
// POST /leave keep their meaning for ever, so that any two can part.
const Protocol = 4

// The paths of the supervisor's API. Everything is JSON.
const (
	pathHello      = "/hello"      // GET → hello
	pathLeave      = "/leave"      // POST: end, leaving the guests to a successor
	pathCreate     = "/create"     // POST ?program=&ahead= runtime.Spec
	pathStart      = "/start"      // POST ?id=
	pathFreeze     = "/freeze"     // POST ?id=
	pathThaw       = "/thaw"       // POST ?id=
	pathCheckpoint = "/checkpoint" // POST ?id=&dir=
	pathRestore    = "/restore"    // POST ?id=&dir=
	pathLoaded     = "/loaded"     // GET ?id= → bool; waits a while
	pathKill       = "/kill"       // POST ?id=
	pathInstances  = "/instances"  // GET → []runtime.Instance
	pathInstance   = "/instance"   // GET ?id= → runtime.Instance
	pathExits      = "/exits"      // GET ?epoch=&after= → exits; waits for news
	pathConsole    = "/console"    // GET ?id= → consoleAnswer
	pathStats      = "/stats"      // GET ?id= → runtime.Stats
	pathShutdown   = "/shutdown"   // POST: end every guest, then end
)

// hello says who answers.
type hello struct {
	Protocol  int               `json:"protocol"`
	Engine    string            `json:"engine"`
	Version   string            `json:"version"` // of Cay
	PID       int               `json:"pid"`
	StartedAt time.Time         `json:"startedAt"`
	Instances int               `json:"instances"`
	Ahead     int               `json:"ahead"` // engines that have no guest yet
	Detail    map[string]string `json:"detail,omitempty"`
}

// exits are the ends of instances since a point in a supervisor's life.
type exits struct {
	Epoch string `json:"epoch"` // another epoch is another supervisor: ask from 0
	Seq   int64  `json:"seq"`
	Exits []exit `json:"exits"`
}

type exit struct {
	ID   runtime.InstanceID `json:"id"`
	Exit runtime.Exit       `json:"exit"`
}

type consoleAnswer struct {
	Lines   []cay.ConsoleLine `json:"lines"`
	Dropped int64             `json:"dropped"`
}

// wireError is a cay.Error on the wire.
type wireError struct {
	Code    cay.Code          `json:"code"`
	Layer   cay.Layer         `json:"layer"`
	Message string            `json:"message"`
	Fix     string            `json:"fix,omitempty"`
	Detail  map[string]string `json:"detail,omitempty"`
	Cause   string            `json:"cause,omitempty"`
}

func toWire(err error) wireError {
	var e *cay.Error
	if !errors.As(err, &e) {
		return wireError{Code: cay.CodeEngineFailed, Layer: cay.LayerRuntime, Message: "the engine's supervisor met an error", Cause: err.Error()}
	}
	w := wireError{Code: e.Code, Layer: e.Layer, Message: e.Message, Fix: e.Fix, Detail: e.Detail}
	if e.Err != nil {
		w.Cause = e.Err.Error()
	}
	return w
}

func (w wireError) err() error {
	e := &cay.Error{Code: w.Code, Layer: w.Layer, Message: w.Message, Fix: w.Fix, Detail: w.Detail}
	if w.Cause != "" {
		e.Err = errors.New(w.Cause)
	}
	return e
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // a client that has gone needs no answer
}

func writeError(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusInternalServerError)
	_ = json.NewEncoder(w).Encode(toWire(err))
}

func notFound(id runtime.InstanceID) error {
	return &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerRuntime, Message: "no instance " + string(id) + " in this runtime"}
}
