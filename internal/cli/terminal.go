package cli

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// FileTerminal returns the terminal that a file is; nil when it is none.
func FileTerminal(f *os.File) Terminal {
	if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err != nil {
		return nil
	}
	return fileTerminal{f}
}

type fileTerminal struct{ f *os.File }

// Raw implements [Terminal] as cfmakeraw(3) does.
func (t fileTerminal) Raw() (func(), error) {
	fd := int(t.f.Fd())
	was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, os.NewSyscallError("ioctl TCGETS", err)
	}
	raw := *was
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag &^= unix.CSIZE | unix.PARENB
	raw.Cflag |= unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, os.NewSyscallError("ioctl TCSETS", err)
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, was) }, nil // the terminal may be gone
}

// Size implements [Terminal].
func (t fileTerminal) Size() (Size, error) {
	ws, err := unix.IoctlGetWinsize(int(t.f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return Size{}, os.NewSyscallError("ioctl TIOCGWINSZ", err)
	}
	return Size{Cols: ws.Col, Rows: ws.Row}, nil
}

// Resized implements [Terminal].
func (t fileTerminal) Resized(f func()) func() {
	ch := make(chan os.Signal, 1)
	done := make(chan struct{})
	signal.Notify(ch, unix.SIGWINCH)
	go func() {
		for {
			select {
			case <-ch:
				f()
			case <-done:
				return
			}
		}
	}()
	return func() { signal.Stop(ch); close(done) }
}
