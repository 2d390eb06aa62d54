package envd

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// Limits of walking a tree.
const (
	// maxListing bounds the answer of one ListDir, in bytes on the wire, more
	// or less. A larger directory is for a program in the sandbox to read.
	maxListing = 64 << 20
	// entrySize is what an entry takes there beside its texts.
	entrySize = 160
	// nameChunk is how many names are read of a directory at once.
	nameChunk = 1024
	// maxRaces bounds how often a name is looked at again because it became
	// something else in between.
	maxRaces = 64
)

// listing walks a tree for ListDir, inside user.do.
type listing struct {
	ctx     context.Context
	s       *Server
	left    int // bytes
	entries []*pb.EntryInfo
}

// root lists a directory, or what a link at path leads to, depth levels deep.
func (l *listing) root(path string, depth int) error {
	fd, err := openPath(path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err == unix.ENOTDIR {
		if p, perr := openPath(path, unix.O_PATH); perr == nil {
			unix.Close(p)
			return invalid("path is not a directory: %s", path)
		}
	}
	if err != nil {
		return err
	}
	return l.dir(fd, path, depth)
}

// dir lists an open directory, which it closes. Names come in the order of
// their bytes, each followed by what is below it.
func (l *listing) dir(fd int, path string, depth int) error {
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	prefix := path + "/"
	if path == "/" {
		prefix = "/"
	}
	var names []string
	for {
		chunk, err := f.Readdirnames(nameChunk)
		for _, n := range chunk {
			if tempKind(n) != 0 {
				continue
			}
			if err := l.spend(entrySize + len(prefix) + 2*len(n)); err != nil {
				return err
			}
			names = append(names, n)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("reading the directory: %w", err)
		}
		if err := l.ctx.Err(); err != nil {
			return err
		}
	}
	slices.Sort(names)
	for _, n := range names {
		if err := l.ctx.Err(); err != nil {
			return err
		}
		st, err := lstatAt(fd, n)
		if err != nil {
			continue // gone since
		}
		e := l.s.describe(fd, n, prefix+n, &st)
		for k, v := range e.Metadata {
			if err := l.spend(len(k) + len(v) + 16); err != nil {
				return err
			}
		}
		l.entries = append(l.entries, e)
		if depth <= 1 || !isDir(&st) {
			continue
		}
		child, err := openChild(fd, n, &st)
		if err != nil {
			if err == unix.EMFILE || err == unix.ENFILE {
				return err
			}
			continue // gone, or not readable for this account
		}
		if err := l.dir(child, prefix+n, depth-1); err != nil {
			return err
		}
	}
	return nil
}

func (l *listing) spend(n int) error {
	if l.left -= n; l.left < 0 {
		return faultf(connect.CodeResourceExhausted,
			"the listing would be larger than %d MiB; list fewer levels, or run a command such as find instead", maxListing>>20)
	}
	return nil
}

// removeAll removes a name and everything below it, inside user.do. A name
// that is missing is no error. It never leaves the tree, whatever is renamed
// or replaced by a link meanwhile.
func removeAll(ctx context.Context, dir int, name string) error {
	for range maxRaces {
		st, err := lstatAt(dir, name)
		if err == unix.ENOENT {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		flags := 0
		if isDir(&st) {
			flags = unix.AT_REMOVEDIR
		}
		err = unix.Unlinkat(dir, name, flags)
		switch err {
		case nil, unix.ENOENT:
			return nil
		case unix.EINTR, unix.EISDIR, unix.ENOTDIR:
			continue
		case unix.ENOTEMPTY, unix.EEXIST:
		default:
			return fmt.Errorf("'%s': %w", name, err)
		}
		child, err := openChild(dir, name, &st)
		switch err {
		case nil:
		case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
			continue
		default:
			return fmt.Errorf("'%s': %w", name, err)
		}
		if err := removeBelow(ctx, child, name); err != nil {
			return err
		}
	}
	return fmt.Errorf("'%s' is being changed: %w", name, unix.EBUSY)
}

// removeBelow empties an open directory, which it closes.
func removeBelow(ctx context.Context, fd int, name string) error {
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	for {
		var first error
		removed := false
		for {
			names, err := f.Readdirnames(nameChunk)
			for _, n := range names {
				err := removeAll(ctx, fd, n)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err == nil {
					removed = true
				} else if first == nil {
					first = err
				}
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				return fmt.Errorf("reading '%s': %w", name, err)
			}
		}
		if !removed {
			return first
		}
		// Removing may have made the kernel skip names.
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("reading '%s' again: %w", name, err)
		}
	}
}

// moveAcross moves between filesystems: a copy beside the destination, one
// rename, and then the source goes. It runs inside user.do.
func moveAcross(ctx context.Context, src, dst place, st *unix.Stat_t) error {
	if old, err := dst.lstat(); err == nil && isDir(&old) != isDir(st) {
		if isDir(&old) {
			return unix.EISDIR
		}
		return unix.ENOTDIR
	}
	tmp := place{dst.dir, tempName(tempCreates)}
	err := copyTree(ctx, src.dir, src.name, tmp.dir, tmp.name)
	if err == nil {
		err = renameat(tmp, dst)
	}
	if err != nil {
		_ = removeAll(context.WithoutCancel(ctx), tmp.dir, tmp.name) // the first error counts
		return err
	}
	if err := removeAll(ctx, src.dir, src.name); err != nil {
		return fmt.Errorf("everything was copied, but removing the source: %w", err)
	}
	return nil
}

// copyTree copies files, directories and links with their modes, times and
// user attributes. The copy belongs to the account; other kinds of files are
// refused.
func copyTree(ctx context.Context, dir int, name string, toDir int, to string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	st, err := lstatAt(dir, name)
	if err != nil {
		return err
	}
	times := []unix.Timespec{{Sec: st.Atim.Sec, Nsec: st.Atim.Nsec}, {Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}}
	switch {
	case isLink(&st):
		buf := make([]byte, maxPath)
		n, err := unix.Readlinkat(dir, name, buf)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(string(buf[:n]), toDir, to); err != nil {
			return err
		}
		return unix.UtimesNanoAt(toDir, to, times, unix.AT_SYMLINK_NOFOLLOW)
	case isDir(&st):
		return copyDir(ctx, dir, name, toDir, to, &st, times)
	case isRegular(&st):
	default:
		return invalid("'%s' is neither a file, a directory nor a link and cannot be moved to another filesystem", name)
	}
	in, err := openAt(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	source := os.NewFile(uintptr(in), name)
	defer source.Close()
	out, err := openAt(toDir, to, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	target := os.NewFile(uintptr(out), to)
	defer target.Close()
	if got, err := fstat(in); err != nil || !sameFile(&got, &st) {
		return fmt.Errorf("'%s' is being changed: %w", name, unix.EBUSY)
	}
	if _, err := io.Copy(target, source); err != nil {
		return err
	}
	return finishCopy(in, out, &st, times)
}

func copyDir(ctx context.Context, dir int, name string, toDir int, to string, st *unix.Stat_t, times []unix.Timespec) error {
	in, err := openChild(dir, name, st)
	if err != nil {
		return err
	}
	source := os.NewFile(uintptr(in), name)
	defer source.Close()
	if err := unix.Mkdirat(toDir, to, 0o700); err != nil {
		return err
	}
	made, err := lstatAt(toDir, to)
	if err != nil {
		return err
	}
	out, err := openChild(toDir, to, &made)
	if err != nil {
		return err
	}
	defer unix.Close(out)
	for {
		names, err := source.Readdirnames(nameChunk)
		for _, n := range names {
			if err := copyTree(ctx, in, n, out, n); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return finishCopy(in, out, st, times)
		}
		if err != nil {
			return err
		}
	}
}

// finishCopy gives a copy what its source has beside content. Rights of the
// owner's kind, set-user-ID and the like, are not given to another owner.
func finishCopy(in, out int, st *unix.Stat_t, times []unix.Timespec) error {
	if m := linkAttrs(fdLink(in)).metadata(); m != nil {
		if _, err := setMetadata(out, m); err != nil {
			return err
		}
	}
	if err := unix.Fchmod(out, st.Mode&0o777|st.Mode&unix.S_ISVTX); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, fdLink(out), times, 0)
}
