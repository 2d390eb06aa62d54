package envd

import (
	"context"
	"crypto/rand"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// maxWatchers bounds the watchers of a sandbox.
const maxWatchers = 1024

// watchers holds the open watchers.
type watchers struct {
	held budget // by events that no client has taken yet

	mu     sync.Mutex
	open   map[*watcher]bool
	byID   map[string]*watcher // those that are polled
	closed bool
}

func newWatchers() *watchers {
	return &watchers{open: map[*watcher]bool{}, byID: map[string]*watcher{}}
}

// closeAll ends every watcher; no new one is opened. It may be called twice.
func (ws *watchers) closeAll() {
	ws.mu.Lock()
	ws.closed = true
	var all []*watcher
	for w := range ws.open {
		all = append(all, w)
	}
	clear(ws.byID)
	ws.mu.Unlock()
	for _, w := range all {
		w.close()
	}
}

// settle makes recursive watchers take in what the kernel has for them. envd
// calls it after it made something itself, so that a directory which a client
// has just made is watched before the client's next request writes into it.
func (ws *watchers) settle() {
	ws.mu.Lock()
	var all []*watcher
	for w := range ws.open {
		if w.recursive && w.live.Load() {
			all = append(all, w)
		}
	}
	ws.mu.Unlock()
	for _, w := range all {
		w.sync()
	}
}

// add enters a watcher before it starts.
func (ws *watchers) add(w *watcher) error {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.closed {
		return faultf(connect.CodeUnavailable, "envd is ending")
	}
	if len(ws.open) >= maxWatchers {
		return faultf(connect.CodeResourceExhausted, "the sandbox has %d watchers already; remove one first", maxWatchers)
	}
	ws.open[w] = true
	return nil
}

func (ws *watchers) drop(w *watcher) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	delete(ws.open, w)
}

// find returns a polled watcher; with take it is forgotten.
func (ws *watchers) find(id string, take bool) (*watcher, error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.byID[id]
	if w == nil && ws.closed {
		return nil, errEnded // the next envd may have it
	}
	if w == nil {
		return nil, notFound("watcher with id %s not found", id)
	}
	if take {
		delete(ws.byID, id)
	}
	return w, nil
}

// watchRequest is what the two ways to watch have in common.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

// watch opens a watcher, which the caller closes.
func (f *filesystemService) watch(h http.Header, req watchRequest) (*watcher, error) {
	u, path, err := f.resolve(h, req.GetPath())
	if err != nil {
		return nil, err
	}
	w := newWatcher(f.s, u, path)
	w.recursive, w.entries, w.network = req.GetRecursive(), req.GetIncludeEntry(), req.GetAllowNetworkMounts()
	if err := f.s.watchers.add(w); err != nil {
		return nil, err
	}
	if err := w.start(); err != nil {
		w.close()
		return nil, pathError(path, err)
	}
	return w, nil
}

// message is an event as the client gets it. The entry is what is there now;
// it is missing if nothing is any more.
func (f *filesystemService) message(w *watcher, ev change) *pb.FilesystemEvent {
	m := &pb.FilesystemEvent{Name: inMessage(ev.name), Type: ev.kind}
	if !w.entries || ev.kind == pb.EventType_EVENT_TYPE_REMOVE || ev.kind == pb.EventType_EVENT_TYPE_RENAME {
		return m
	}
	path := filepath.Join(w.path, ev.name)
	if e, err := with(w.u, func() (*pb.EntryInfo, error) { return f.describe(path) }); err == nil {
		m.Entry = e
	}
	return m
}

func (f *filesystemService) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest], stream *connect.ServerStream[pb.WatchDirResponse]) error {
	w, err := f.watch(req.Header(), req.Msg)
	if err != nil {
		return rpcError(err)
	}
	defer w.close()
	err = stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Start{Start: &pb.WatchDirResponse_StartEvent{}}})
	if err != nil {
		return err
	}
	every := keepalive(req.Header())
	t := time.NewTimer(every)
	defer t.Stop()
	for {
		evs, err := w.take()
		for _, ev := range evs {
			err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Filesystem{Filesystem: f.message(w, ev)}})
			if err != nil {
				return err
			}
			t.Reset(every)
		}
		if err != nil {
			return rpcError(err)
		}
		select {
		case <-w.ready:
		case <-t.C:
			err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Keepalive{Keepalive: &pb.WatchDirResponse_KeepAlive{}}})
			if err != nil {
				return err
			}
			t.Reset(every)
		case <-ctx.Done():
			return contextError(ctx)
		}
	}
}

func (f *filesystemService) CreateWatcher(_ context.Context, req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	w, err := f.watch(req.Header(), req.Msg)
	if err != nil {
		return nil, rpcError(err)
	}
	id := "w" + rand.Text()
	ws := f.s.watchers
	ws.mu.Lock()
	ws.byID[id] = w
	ws.mu.Unlock()
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: id}), nil
}

// GetWatcherEvents returns what happened since the last call, up to now.
func (f *filesystemService) GetWatcherEvents(_ context.Context, req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	w, err := f.s.watchers.find(req.Msg.GetWatcherId(), false)
	if err != nil {
		return nil, rpcError(err)
	}
	w.sync()
	evs, err := w.take()
	if err != nil && len(evs) == 0 {
		return nil, rpcError(err)
	}
	resp := &pb.GetWatcherEventsResponse{}
	for _, ev := range evs {
		resp.Events = append(resp.Events, f.message(w, ev))
	}
	return connect.NewResponse(resp), nil
}

func (f *filesystemService) RemoveWatcher(_ context.Context, req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	w, err := f.s.watchers.find(req.Msg.GetWatcherId(), true)
	if err != nil {
		return nil, rpcError(err)
	}
	w.close()
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}

// errEnded is why a watcher that was closed has no more events.
var errEnded = faultf(connect.CodeUnavailable, "the watcher has ended")
