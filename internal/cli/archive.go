package cli

import (
	"bufio"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/operator"
)

func (c *CLI) snapshotExportCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "export SNAPSHOT FILE",
		Short: "Write a snapshot into one file",
		Long: `Writes a snapshot into one file, with all that another data directory needs to
take it in: memory, disk, manifest, and the token of the daemon in it. It is
compressed, and as secret as what was in the sandbox. "-" is standard output.

It can be imported where the same build of its template is, and, for its memory,
the same version of the engine.`,
		Example: `  cay snapshot export warm:v2 warm.cay
  cay snapshot export s1a2b3c4d5e6f7g8h9j0k - | ssh other cay snapshot import -`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: c.snapshotThenFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			id, err := client.snapshotID(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return c.export(cmd.Context(), client, id, args[1])
		},
	}
}

func (c *CLI) snapshotImportCmd() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Take in a snapshot from a file that export wrote",
		Long: `Takes in a snapshot, all of it or nothing, and prints the new ID, from which
sandboxes can be made. Every part is compared with its digest. "-" is standard
input. Import only files of servers that you trust: a memory and a disk are
taken as they are.`,
		Example: "  cay snapshot import warm.cay\n  cay snapshot import warm.cay --name warm:v2",
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			return c.importFrom(cmd.Context(), client, args[0], name)
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "what to call it, as name or name:tag")
	return cmd
}

// snapshotThenFile completes a snapshot's ID, and then a file.
func (c *CLI) snapshotThenFile(cmd *cobra.Command, args []string, text string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return c.snapshotIDs(cmd, args, text)
	}
	return nil, cobra.ShellCompDirectiveDefault
}

// fileError is a failure of a file that the user named.
func fileError(what, path string, err error, fix string) error {
	return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerStorage, Message: fmt.Sprintf("could not %s %s: %v", what, path, cause(err)), Fix: fix, Err: err}
}

// export writes an archive, of which nothing is left if it is not whole.
func (c *CLI) export(ctx context.Context, client *Client, id, path string) error {
	out := c.Out
	if path == "-" && c.OutTerm {
		return &UsageError{"cay snapshot export", errors.New("an archive is not for a terminal: name a file, or use a pipe")}
	}
	var part *os.File
	if path != "-" {
		if _, err := os.Lstat(path); err == nil {
			return fileError("write", path, fs.ErrExist, "choose another name, or remove it")
		}
		var err error
		// What was in the sandbox is nobody else's to read.
		if part, err = os.OpenFile(path+".part", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return fileError("write", path, err, "choose a directory that you may write to")
		}
		out = part
		defer func() {
			_ = part.Close()           // once more, after an error
			_ = os.Remove(part.Name()) // gone after the rename
		}()
	}
	resp, err := client.operator.ExportSnapshot(ctx, id)
	if err != nil {
		return client.unreachable(err)
	}
	defer resp.Body.Close()
	if err := refusal(resp, http.StatusOK); err != nil {
		return err
	}
	m := c.meter("exported", resp.ContentLength)
	counted := &counter{w: bufio.NewWriterSize(out, 1<<20)}
	zip, err := gzip.NewWriterLevel(counted, gzip.BestSpeed)
	if err == nil {
		_, err = io.Copy(zip, m.reader(resp.Body))
		m.stop()
	}
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return &cay.Error{Code: cay.CodeSnapshotCorrupt, Layer: cay.LayerStorage, Message: fmt.Sprintf("exporting snapshot %s broke off: %v", id, cause(err)),
			Fix: "`cay snapshot verify " + id + "` says whether a part of it is damaged; else there may be no room for the file", Err: err}
	}
	if err := errors.Join(zip.Close(), counted.w.Flush()); err != nil {
		return fileError("write", path, err, "make room for it")
	}
	if part != nil {
		if err := errors.Join(part.Sync(), part.Close(), os.Rename(part.Name(), path)); err != nil {
			return fileError("write", path, err, "make room for it")
		}
	}
	fmt.Fprintf(c.Err, "Exported snapshot %s: %s, %s compressed.\n", id, mebibytes(m.done.Load()), mebibytes(counted.n))
	return nil
}

// importFrom sends an archive, and prints the ID of the snapshot.
func (c *CLI) importFrom(ctx context.Context, client *Client, path, name string) error {
	in, size := c.In, int64(-1)
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return fileError("read", path, err, "name a file that `cay snapshot export` wrote")
		}
		defer f.Close()
		if fi, err := f.Stat(); err == nil {
			size = fi.Size()
		}
		in = f
	}
	m := c.meter("read", size)
	defer m.stop()
	zip, err := gzip.NewReader(bufio.NewReaderSize(m.reader(in), 1<<20))
	if err != nil {
		return fileError("read", path, err, "name a file that `cay snapshot export` wrote; this is none")
	}
	params := operator.ImportSnapshotParams{TeamID: string(client.server.TeamID)}
	if name != "" {
		params.Name = &name
	}
	from := &failing{r: zip}
	r, err := client.operator.ImportSnapshotWithBodyWithResponse(ctx, &params, "application/x-tar", from)
	m.stop()
	if from.err != nil {
		return fileError("read", path, from.err, "copy or export it again; nothing was imported")
	}
	if err != nil {
		return client.unreachable(err)
	}
	made, err := body(r.JSON201, r.HTTPResponse, fault(r.JSONDefault), http.StatusCreated)
	if err == nil {
		fmt.Fprintf(c.Err, "Imported a snapshot of sandbox %s, with %s of memory.\n", made.SandboxID, mebibytes(made.MemoryBytes))
		fmt.Fprintln(c.Out, made.SnapshotID)
	}
	return err
}

// refusal is what answered says of an answer that was not read yet.
func refusal(resp *http.Response, want int) error {
	if resp.StatusCode == want {
		return nil
	}
	var f operator.Failure
	if json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&f) != nil {
		return strange(resp)
	}
	return answered(resp, fault(&f), want)
}

// failing keeps the error of a reader, which the HTTP client words in its own way.
type failing struct {
	r   io.Reader
	err error
}

// Read implements [io.Reader].
func (f *failing) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		f.err = err
	}
	return n, err
}

type counter struct {
	w *bufio.Writer
	n int64
}

// Write implements [io.Writer].
func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// meter tells how far something has come, until stop.
type meter struct {
	done atomic.Int64
	end  chan struct{}
	told chan struct{}
}

// How often a person who watches is told, and a log.
const (
	meterLive = 200 * time.Millisecond
	meterLog  = 10 * time.Second
)

// meter begins to tell, of a total that is -1 if nobody knows it.
func (c *CLI) meter(what string, total int64) *meter {
	m := &meter{end: make(chan struct{}), told: make(chan struct{})}
	every, from, to := meterLog, "", "\n"
	if c.Colour { // a terminal
		every, from, to = meterLive, "\r\x1b[K", ""
	}
	go func() {
		defer close(m.told)
		tick := time.NewTicker(every)
		defer tick.Stop()
		shown := false
		for {
			select {
			case <-m.end:
				if shown && c.Colour {
					fmt.Fprint(c.Err, from)
				}
				return
			case <-tick.C:
				shown = true
				n := m.done.Load()
				if total > 0 {
					fmt.Fprintf(c.Err, "%s%s %s of %s (%d%%)%s", from, what, mebibytes(n), mebibytes(total), n*100/total, to)
				} else {
					fmt.Fprintf(c.Err, "%s%s %s%s", from, what, mebibytes(n), to)
				}
			}
		}
	}()
	return m
}

// stop ends it, and may be called twice.
func (m *meter) stop() {
	select {
	case <-m.end:
	default:
		close(m.end)
	}
	<-m.told
}

// reader counts what is read.
func (m *meter) reader(r io.Reader) io.Reader { return io.TeeReader(r, metered{m}) }

type metered struct{ m *meter }

// Write implements [io.Writer].
func (w metered) Write(p []byte) (int, error) {
	w.m.done.Add(int64(len(p)))
	return len(p), nil
}
