package envd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
)

// input writes to the process. A full pipe makes it wait until done is closed.
func (p *process) input(done <-chan struct{}, in *pb.ProcessInput) error {
	select {
	case p.inMu <- struct{}{}:
		defer func() { <-p.inMu }()
	case <-done:
		return faultf(connect.CodeCanceled, "waiting for earlier input to be taken")
	}
	var f *os.File
	var data []byte
	switch v := in.GetInput().(type) {
	case *pb.ProcessInput_Pty:
		if p.pty == nil {
			return faultf(connect.CodeInternal, "error writing to tty: tty not assigned to process")
		}
		f, data = p.pty, v.Pty
	case *pb.ProcessInput_Stdin:
		switch {
		case p.pty != nil:
			return faultf(connect.CodeInternal, "error writing to stdin: tty assigned to process, use the pty input")
		case p.stdin == nil || p.inClosed:
			return faultf(connect.CodeInternal, "error writing to stdin: stdin not enabled or closed")
		}
		f, data = p.stdin, v.Stdin
	default:
		return faultf(connect.CodeUnimplemented, "invalid input type %T", in.GetInput())
	}
	over := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-done:
			f.SetWriteDeadline(time.Unix(1, 0))
		case <-over:
		}
	}()
	_, err := f.Write(data)
	close(over)
	<-stopped
	f.SetWriteDeadline(time.Time{})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return faultf(connect.CodeCanceled, "the process does not read its input")
	case errors.Is(err, os.ErrClosed), errors.Is(err, io.ErrClosedPipe):
		return notFound("process with pid %d has ended", p.pid)
	case err != nil:
		return faultf(connect.CodeInternal, "error writing to process: %v", err)
	}
	return nil
}

// closeStdin ends the standard input; twice is fine.
func (p *process) closeStdin(done <-chan struct{}, keeper *keeperConn) error {
	if p.pty != nil {
		return faultf(connect.CodeUnknown, "cannot close the stdin of a process with a terminal; send it Ctrl-D")
	}
	select {
	case p.inMu <- struct{}{}:
		defer func() { <-p.inMu }()
	case <-done:
		return faultf(connect.CodeCanceled, "waiting for earlier input to be taken")
	}
	if p.stdin == nil || p.inClosed {
		return nil
	}
	p.inClosed = true
	if err := p.stdin.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("closing stdin: %w", err)
	}
	keeper.tell(closeFile, p.pid, []byte{fileStdin}) // else the process would see no end
	return nil
}
