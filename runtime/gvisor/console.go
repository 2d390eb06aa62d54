package gvisor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// Limits of a console. The log is two files of which the older is dropped when
// the newer is full, so between half and all of consoleMax is there to read.
const (
	consoleMax   = 1 << 20 // bytes on disk of one instance
	consoleHalf  = consoleMax / 2
	consoleLine  = 4 << 10   // a longer line is cut into several
	consoleRate  = 256 << 10 // bytes kept each second
	consoleBurst = 1 << 20
)

// console keeps what a guest writes to its standard output and error.
//
// The guest's end is a named pipe opened for reading and writing, so that it
// neither breaks nor fills up for good when the supervisor dies: the next one
// opens the same name.
type console struct {
	pipe *os.File
	log  string // path of the files without their ".0" and ".1"
	now  func() time.Time

	mu      sync.Mutex
	cur     *os.File
	size    int
	partial []byte    // a line without its end
	at      time.Time // when partial began
	tokens  float64
	filled  time.Time
	dropped int64 // bytes dropped since the last line kept
	total   int64 // bytes dropped in all
	done    chan struct{}
}

// makeConsole makes the pipe of a new instance.
func makeConsole(path string) error {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("making the console pipe: %w", err)
	}
	return nil
}

// openConsole starts to read a console. Close ends it.
func openConsole(path, log string, now func() time.Time) (*console, error) {
	pipe, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the console pipe: %w", err)
	}
	cur, err := os.OpenFile(log+".0", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		pipe.Close()
		return nil, fmt.Errorf("opening the console log: %w", err)
	}
	c := &console{pipe: pipe, log: log, now: now, cur: cur, tokens: consoleBurst, filled: now(), done: make(chan struct{})}
	if st, err := cur.Stat(); err == nil {
		c.size = int(st.Size())
	}
	go c.run()
	return c, nil
}

// openConsoleEnd opens the end that the guest gets. It may block the guest.
func openConsoleEnd(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the guest's end of the console: %w", err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

var consoleBuffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// run reads until the pipe is closed. It holds a buffer only while there is
// something to read: most consoles are silent.
func (c *console) run() {
	defer close(c.done)
	raw, err := c.pipe.SyscallConn()
	if err != nil {
		return
	}
	for {
		flooded, stop := false, false
		err := raw.Read(func(fd uintptr) bool {
			buf := consoleBuffers.Get().(*[]byte)
			defer consoleBuffers.Put(buf)
			c.mu.Lock() // so that whoever holds it, and finds the pipe empty, has all
			defer c.mu.Unlock()
			n, err := unix.Read(int(fd), *buf)
			switch {
			case errors.Is(err, unix.EAGAIN):
				return false
			case errors.Is(err, unix.EINTR):
				return true
			case err != nil || n == 0:
				stop = true
				return true
			}
			flooded = c.take((*buf)[:n])
			return true
		})
		if err != nil || stop {
			return
		}
		if flooded {
			// What is read now is thrown away: do it at the guest's cost. A
			// millisecond for each pipe-full is 64 MB/s, which no honest
			// guest writes to its console.
			time.Sleep(time.Millisecond)
		}
	}
}

// take splits data into lines and keeps what the rate allows; it reports
// whether something was dropped. c.mu is held.
func (c *console) take(data []byte) (flooded bool) {
	now := c.now()
	c.tokens = min(consoleBurst, c.tokens+consoleRate*now.Sub(c.filled).Seconds())
	c.filled = now
	if float64(len(data)) > c.tokens {
		c.dropped += int64(len(data))
		c.total += int64(len(data))
		return true
	}
	c.tokens -= float64(len(data))
	var out bytes.Buffer
	if c.dropped > 0 {
		c.endLine(&out)
		c.partial = fmt.Appendf(c.partial, "[cay: %d bytes of console output dropped]", c.dropped)
		c.at, c.dropped = now, 0
		c.endLine(&out)
	}
	for len(data) > 0 {
		line, rest, ended := bytes.Cut(data, []byte("\n"))
		if room := consoleLine - len(c.partial); len(line) > room {
			line, rest, ended = data[:room], data[room:], true
		}
		if len(c.partial) == 0 {
			c.at = now
		}
		c.partial = append(c.partial, line...)
		if ended {
			c.endLine(&out)
		}
		data = rest
	}
	c.write(out.Bytes())
	return false
}

// endLine moves the partial line to out.
func (c *console) endLine(out *bytes.Buffer) {
	if len(c.partial) == 0 {
		return // an empty line tells nobody anything
	}
	out.WriteString(strconv.FormatInt(c.at.UnixNano(), 10))
	out.WriteByte(' ')
	out.Write(bytes.TrimRight(c.partial, "\r"))
	out.WriteByte('\n')
	c.partial = c.partial[:0]
}

// write appends whole records to the log. A full disk loses console output and
// nothing else.
func (c *console) write(p []byte) {
	for len(p) > 0 && c.cur != nil {
		n := len(p)
		if room := consoleHalf - c.size; n > room {
			n = bytes.LastIndexByte(p[:max(room, 0)], '\n') + 1
		}
		if n == 0 {
			c.rotate()
			continue
		}
		if _, err := c.cur.Write(p[:n]); err != nil {
			c.total += int64(len(p))
			return
		}
		c.size += n
		p = p[n:]
	}
}

func (c *console) rotate() {
	c.cur.Close()
	c.cur = nil
	if err := os.Rename(c.log+".0", c.log+".1"); err != nil {
		return
	}
	if f, err := os.OpenFile(c.log+".0", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600); err == nil {
		c.cur, c.size = f, 0
	}
}

// lines returns what is kept, oldest first, and how many bytes were dropped.
func (c *console) lines() ([]cay.ConsoleLine, int64, error) {
	if c == nil {
		return nil, 0, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var out bytes.Buffer
	if len(c.partial) > 0 {
		rest := bytes.Clone(c.partial)
		c.endLine(&out)
		c.partial = rest // it goes on; only the answer ends it
	}
	var lines []cay.ConsoleLine
	for _, name := range []string{c.log + ".1", c.log + ".0"} {
		data, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, c.total, fmt.Errorf("reading the console log: %w", err)
		}
		lines = append(lines, parseConsole(data)...)
	}
	return append(lines, parseConsole(out.Bytes())...), c.total, nil
}

// parseConsole reads records; what is malformed, as after a full disk, is left
// out.
func parseConsole(data []byte) []cay.ConsoleLine {
	var lines []cay.ConsoleLine
	for rec := range bytes.Lines(data) {
		stamp, text, ok := bytes.Cut(bytes.TrimSuffix(rec, []byte("\n")), []byte(" "))
		nanos, err := strconv.ParseInt(string(stamp), 10, 64)
		if !ok || err != nil {
			continue
		}
		lines = append(lines, cay.ConsoleLine{At: time.Unix(0, nanos).UTC(), Text: string(bytes.ToValidUTF8(text, []byte("\uFFFD")))})
	}
	return lines
}

// drain waits until what the guest wrote before its end has been read.
func (c *console) drain() {
	if c == nil {
		return
	}
	raw, err := c.pipe.SyscallConn()
	if err != nil {
		return
	}
	for range 100 {
		empty := true
		_ = raw.Control(func(fd uintptr) { empty = !readable(fd) })
		if empty {
			break
		}
		time.Sleep(time.Millisecond)
	}
}

// close stops reading.
func (c *console) close() {
	if c == nil {
		return
	}
	c.pipe.Close()
	<-c.done
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur != nil {
		c.cur.Close()
		c.cur = nil
	}
}
