package envd

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
)

// processService answers the calls of package process.
type processService struct{ s *Server }

// Keepalives: how often a silent stream says that it lives. The timeout is
// Connect's own header, in milliseconds.
const (
	headerKeepalive  = "Keepalive-Ping-Interval"
	headerTimeout    = "Connect-Timeout-Ms"
	defaultKeepalive = 90 * time.Second
	maxKeepalive     = 24 * time.Hour
)

// keepalive reads the interval a client asks for, in whole seconds; anything
// else means the default.
func keepalive(h http.Header) time.Duration {
	n, err := strconv.ParseUint(h.Get(headerKeepalive), 10, 32)
	if err != nil || n == 0 {
		return defaultKeepalive
	}
	return min(time.Duration(n)*time.Second, maxKeepalive)
}

// contextError is how a stream ends that its client gave up or whose time is
// over; nil if neither is so.
func contextError(ctx context.Context) error {
	at, ok := ctx.Deadline()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded), ok && !time.Now().Before(at):
		return connect.NewError(connect.CodeDeadlineExceeded, context.DeadlineExceeded)
	case ctx.Err() != nil:
		return connect.NewError(connect.CodeCanceled, context.Canceled)
	}
	return nil
}

func (ps *processService) List(context.Context, *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	return connect.NewResponse(&pb.ListResponse{Processes: ps.s.procs.list()}), nil
}

// Start runs a program. The request's deadline is the program's; a client that
// goes away is not.
func (ps *processService) Start(ctx context.Context, req *connect.Request[pb.StartRequest], stream *connect.ServerStream[pb.StartResponse]) error {
	u, err := ps.s.requestUser(req.Header())
	if err != nil {
		return rpcError(err)
	}
	if req.Msg.GetProcess() == nil {
		return rpcError(invalid("the request names no process"))
	}
	st := ps.s.settings()
	until, _ := ctx.Deadline()
	p, err := ps.s.procs.start(command{
		config: req.Msg.GetProcess(), tag: req.Msg.Tag, pty: req.Msg.GetPty(),
		stdin: req.Msg.Stdin == nil || req.Msg.GetStdin(),
		user:  u, env: st.env, dir: st.workdir, until: until,
	})
	if err != nil {
		return rpcError(err)
	}
	sub, _ := p.subscribe(ctx.Done())
	go p.follow(ps.s.procs)
	err = followStream(ctx, ps.s.procs.leave.stopped, p, sub, keepalive(req.Header()), func(ev *pb.ProcessEvent) error {
		return stream.Send(&pb.StartResponse{Event: ev})
	})
	return rpcError(err)
}

// Connect joins a running program, or tells how an ended one ended.
func (ps *processService) Connect(ctx context.Context, req *connect.Request[pb.ConnectRequest], stream *connect.ServerStream[pb.ConnectResponse]) error {
	p, err := ps.s.procs.find(req.Msg.GetProcess(), true)
	if err != nil {
		return rpcError(err)
	}
	send := func(ev *pb.ProcessEvent) error { return stream.Send(&pb.ConnectResponse{Event: ev}) }
	sub, end := p.subscribe(ctx.Done())
	if end != nil {
		if err := send(startEvent(p)); err != nil {
			return err
		}
		return send(endOf(end))
	}
	return rpcError(followStream(ctx, ps.s.procs.leave.stopped, p, sub, keepalive(req.Header()), send))
}

func startEvent(p *process) *pb.ProcessEvent {
	return &pb.ProcessEvent{Event: &pb.ProcessEvent_Start{Start: &pb.ProcessEvent_StartEvent{Pid: p.pid}}}
}

func endOf(e *pb.ProcessEvent_EndEvent) *pb.ProcessEvent {
	return &pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: e}}
}

// followStream sends a process's events until the end, or until envd leaves.
func followStream(ctx context.Context, stopped <-chan struct{}, p *process, sub *subscriber, every time.Duration, send func(*pb.ProcessEvent) error) error {
	defer p.unsubscribe(sub)
	if err := send(startEvent(p)); err != nil {
		return err
	}
	t := time.NewTimer(every)
	defer t.Stop()
	for {
		select {
		case ev := <-sub.ch:
			if err := send(ev); err != nil {
				return err
			}
		case <-p.done:
			// A program that its deadline ended did not end by itself.
			if err := contextError(ctx); err != nil {
				return err
			}
			return send(endOf(p.end))
		case <-t.C:
			if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Keepalive{Keepalive: &pb.ProcessEvent_KeepAlive{}}}); err != nil {
				return err
			}
		case <-ctx.Done():
			return contextError(ctx)
		case <-stopped:
			return faultf(connect.CodeUnavailable, "envd is being replaced; the process with pid %d goes on: connect to it again", p.pid)
		}
		t.Reset(every)
	}
}

func (ps *processService) Update(_ context.Context, req *connect.Request[pb.UpdateRequest]) (*connect.Response[pb.UpdateResponse], error) {
	p, err := ps.s.procs.find(req.Msg.GetProcess(), false)
	if err != nil {
		return nil, rpcError(err)
	}
	if req.Msg.GetPty() != nil {
		if p.pty == nil {
			return nil, rpcError(faultf(connect.CodeInternal, "error resizing tty: tty not assigned to process"))
		}
		if err := setSize(p.pty, req.Msg.GetPty().GetSize()); err != nil {
			return nil, rpcError(err)
		}
	}
	return connect.NewResponse(&pb.UpdateResponse{}), nil
}

func (ps *processService) StreamInput(ctx context.Context, stream *connect.ClientStream[pb.StreamInputRequest]) (*connect.Response[pb.StreamInputResponse], error) {
	var p *process
	for stream.Receive() {
		switch ev := stream.Msg().GetEvent().(type) {
		case *pb.StreamInputRequest_Start:
			if p != nil {
				return nil, rpcError(invalid("the stream has started already"))
			}
			found, err := ps.s.procs.find(ev.Start.GetProcess(), false)
			if err != nil {
				return nil, rpcError(err)
			}
			p = found
		case *pb.StreamInputRequest_Data:
			if p == nil {
				return nil, rpcError(invalid("the first message of the stream must name the process"))
			}
			if err := p.input(ctx.Done(), ev.Data.GetInput()); err != nil {
				return nil, rpcError(err)
			}
		case *pb.StreamInputRequest_Keepalive:
		default:
			return nil, rpcError(faultf(connect.CodeUnimplemented, "invalid event type %T", ev))
		}
	}
	if err := stream.Err(); err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&pb.StreamInputResponse{}), nil
}

func (ps *processService) SendInput(ctx context.Context, req *connect.Request[pb.SendInputRequest]) (*connect.Response[pb.SendInputResponse], error) {
	p, err := ps.s.procs.find(req.Msg.GetProcess(), false)
	if err == nil {
		err = p.input(ctx.Done(), req.Msg.GetInput())
	}
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&pb.SendInputResponse{}), nil
}

func (ps *processService) SendSignal(_ context.Context, req *connect.Request[pb.SendSignalRequest]) (*connect.Response[pb.SendSignalResponse], error) {
	p, err := ps.s.procs.find(req.Msg.GetProcess(), false)
	if err != nil {
		return nil, rpcError(err)
	}
	switch req.Msg.GetSignal() {
	case pb.Signal_SIGNAL_SIGKILL:
		p.kill()
	case pb.Signal_SIGNAL_SIGTERM:
		if err := signalSession(p.pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, rpcError(faultf(connect.CodeInternal, "error sending signal: %v", err))
		}
	default:
		return nil, rpcError(faultf(connect.CodeUnimplemented, "invalid signal: %s", req.Msg.GetSignal()))
	}
	return connect.NewResponse(&pb.SendSignalResponse{}), nil
}

func (ps *processService) CloseStdin(ctx context.Context, req *connect.Request[pb.CloseStdinRequest]) (*connect.Response[pb.CloseStdinResponse], error) {
	p, err := ps.s.procs.find(req.Msg.GetProcess(), false)
	if err == nil {
		err = p.closeStdin(ctx.Done(), ps.s.procs.keeper)
	}
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&pb.CloseStdinResponse{}), nil
}
