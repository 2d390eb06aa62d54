package meminfo

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestMemory(t *testing.T) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	want := int64(info.Totalram) * int64(info.Unit)
	if n, err := Total(); err != nil || n != want {
		t.Errorf("%d bytes in all, %v; want %d", n, err, want)
	}
	if n, err := Available(); err != nil || n <= 0 || n > want {
		t.Errorf("%d bytes are available of %d, %v", n, want, err)
	}
	if n, err := read("NoSuchField"); err == nil {
		t.Errorf("a field that is not there has %d bytes", n)
	}
}
