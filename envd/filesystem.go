package envd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// filesystemService answers the calls of package filesystem. What it does to
// files, it does with the rights of the account that the request names.
type filesystemService struct{ s *Server }

// resolve is the account of a request and its path, clean and absolute.
func (f *filesystemService) resolve(h http.Header, path string) (*user, string, error) {
	u, err := f.s.requestUser(h)
	if err != nil {
		return nil, "", err
	}
	path, err = resolvePath(path, u, f.s.settings().workdir)
	return u, path, err
}

// pathError says which path an error of the kernel is about. A path through a
// file is a missing path: no such thing can be there.
func pathError(path string, err error) error {
	if _, ok := errors.AsType[*fault](err); ok {
		return err
	}
	if isNotExist(err) {
		return notFound("path '%s' not found", path)
	}
	return fmt.Errorf("path '%s': %w", path, err)
}

// describe returns the entry of a path.
func (f *filesystemService) describe(path string) (*pb.EntryInfo, error) {
	p, err := placeOf(path)
	if err != nil {
		return nil, err
	}
	defer p.close()
	return f.s.entryAt(p.dir, p.name, path)
}

func (f *filesystemService) Stat(_ context.Context, req *connect.Request[pb.StatRequest]) (*connect.Response[pb.StatResponse], error) {
	u, path, err := f.resolve(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, rpcError(err)
	}
	e, err := with(u, func() (*pb.EntryInfo, error) { return f.describe(path) })
	if err != nil {
		return nil, rpcError(pathError(path, err))
	}
	return connect.NewResponse(&pb.StatResponse{Entry: e}), nil
}

func (f *filesystemService) MakeDir(_ context.Context, req *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	u, path, err := f.resolve(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, rpcError(err)
	}
	e, err := with(u, func() (*pb.EntryInfo, error) {
		if err := makeDir(path); err != nil {
			return nil, err
		}
		return f.describe(path)
	})
	f.s.watchers.settle()
	if err != nil {
		return nil, rpcError(pathError(path, err))
	}
	return connect.NewResponse(&pb.MakeDirResponse{Entry: e}), nil
}

// makeDir makes a directory that is not there yet, and its parents.
func makeDir(path string) error {
	exists := func(fd int) error {
		st, err := fstat(fd)
		unix.Close(fd)
		switch {
		case err != nil:
			return err
		case isDir(&st):
			return faultf(connect.CodeAlreadyExists, "directory already exists: %s", path)
		default:
			return invalid("path already exists but it is not a directory: %s", path)
		}
	}
	if fd, err := openPath(path, unix.O_PATH); err == nil {
		return exists(fd)
	} else if err == unix.ENOTDIR {
		return invalid("a parent of '%s' is not a directory", path)
	} else if err != unix.ENOENT {
		return err
	}
	dir, err := makeDirs(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	name := filepath.Base(path)
	err = unix.Mkdirat(dir, name, 0o755)
	if err != unix.EEXIST {
		return err
	}
	fd, err := openAt(dir, name, unix.O_PATH, 0)
	if err != nil {
		// A link whose target is missing.
		return invalid("path already exists but it is not a directory: %s", path)
	}
	return exists(fd)
}

func (f *filesystemService) Move(ctx context.Context, req *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	if req.Msg.GetSource() == "" || req.Msg.GetDestination() == "" {
		return nil, rpcError(invalid("source and destination must not be empty"))
	}
	u, from, err := f.resolve(req.Header(), req.Msg.GetSource())
	if err != nil {
		return nil, rpcError(err)
	}
	_, to, err := f.resolve(req.Header(), req.Msg.GetDestination())
	if err != nil {
		return nil, rpcError(err)
	}
	e, err := with(u, func() (*pb.EntryInfo, error) {
		if err := move(ctx, from, to); err != nil {
			return nil, err
		}
		return f.describe(to)
	})
	f.s.watchers.settle()
	if err != nil {
		return nil, rpcError(pathError(from, err))
	}
	return connect.NewResponse(&pb.MoveResponse{Entry: e}), nil
}

// move renames, across filesystems too, and makes the destination's parents.
func move(ctx context.Context, from, to string) error {
	src, err := placeOf(from)
	if err != nil {
		return err
	}
	defer src.close()
	st, err := src.lstat()
	if err != nil {
		return err
	}
	if from == "/" || to == "/" {
		return invalid("the root directory cannot be moved or replaced")
	}
	dir, err := makeDirs(filepath.Dir(to))
	if isNotExist(err) {
		return invalid("a parent of '%s' is not a directory", to)
	}
	if err != nil {
		return fmt.Errorf("making the parents of '%s': %w", to, err)
	}
	dst := place{dir, filepath.Base(to)}
	defer dst.close()
	err = renameat(src, dst)
	if err == unix.EXDEV {
		err = moveAcross(ctx, src, dst, &st)
	}
	if err != nil && !isNotExist(err) {
		return fmt.Errorf("moving to '%s': %w", to, err)
	}
	return err
}

func renameat(from, to place) error {
	for {
		err := unix.Renameat(from.dir, from.name, to.dir, to.name)
		if err != unix.EINTR {
			return err
		}
	}
}

func (f *filesystemService) ListDir(ctx context.Context, req *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	u, path, err := f.resolve(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, rpcError(err)
	}
	l := listing{ctx: ctx, s: f.s, left: maxListing}
	if err := u.do(func() error { return l.root(path, int(max(req.Msg.GetDepth(), 1))) }); err != nil {
		return nil, rpcError(pathError(path, err))
	}
	return connect.NewResponse(&pb.ListDirResponse{Entries: l.entries}), nil
}

func (f *filesystemService) Remove(ctx context.Context, req *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	if req.Msg.GetPath() == "" {
		return nil, rpcError(invalid("path must not be empty"))
	}
	u, path, err := f.resolve(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, rpcError(err)
	}
	if path == "/" {
		return nil, rpcError(invalid("the root directory cannot be removed"))
	}
	err = u.do(func() error {
		p, err := placeOf(path)
		if err != nil {
			return err
		}
		defer p.close()
		return removeAll(ctx, p.dir, p.name)
	})
	if err != nil && !isNotExist(err) {
		return nil, rpcError(fmt.Errorf("removing '%s': %w", path, err))
	}
	return connect.NewResponse(&pb.RemoveResponse{}), nil
}
