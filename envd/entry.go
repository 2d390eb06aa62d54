package envd

import (
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// entryAt describes a name in an open directory. path is what the entry says;
// nothing is opened by it. It is called inside user.do.
func (s *Server) entryAt(dir int, name, path string) (*pb.EntryInfo, error) {
	st, err := lstatAt(dir, name)
	if err != nil {
		return nil, err
	}
	return s.describe(dir, name, path, &st), nil
}

// describe is entryAt for a name that was looked at.
func (s *Server) describe(dir int, name, path string, st *unix.Stat_t) *pb.EntryInfo {
	e := &pb.EntryInfo{
		Name:         inMessage(filepath.Base(path)),
		Type:         fileType(st.Mode),
		Path:         inMessage(path),
		Size:         st.Size,
		Mode:         st.Mode & 0o777,
		Permissions:  fileMode(st.Mode).String(),
		ModifiedTime: timestamppb.New(time.Unix(st.Mtim.Unix())),
	}
	e.Owner, e.Group = s.users.owner(st.Uid, st.Gid)
	switch {
	case isLink(st):
		e.Type = pb.FileType_FILE_TYPE_UNSPECIFIED
		e.SymlinkTarget = &e.Path
		fd, err := openAt(dir, name, unix.O_PATH, 0)
		if err != nil {
			break
		}
		defer unix.Close(fd)
		target, err := fstat(fd)
		if err != nil {
			break
		}
		e.Type, e.Mode = fileType(target.Mode), target.Mode&0o777
		if p, err := fdPath(fd); err == nil {
			p = inMessage(p)
			e.SymlinkTarget = &p
		}
		if isRegular(&target) || isDir(&target) {
			e.Metadata = linkAttrs(fdLink(fd)).metadata()
		}
	case isRegular(st), isDir(st):
		e.Metadata = pathAttrs(fdLink(dir) + "/" + name).metadata()
	}
	return e
}

// inMessage is a name as a message can have it, in UTF-8: what is not becomes
// U+FFFD, so that one such name does not take a whole listing away.
func inMessage(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

func fileType(mode uint32) pb.FileType {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return pb.FileType_FILE_TYPE_FILE
	case unix.S_IFDIR:
		return pb.FileType_FILE_TYPE_DIRECTORY
	case unix.S_IFLNK:
		return pb.FileType_FILE_TYPE_SYMLINK
	default:
		return pb.FileType_FILE_TYPE_UNSPECIFIED
	}
}

// fileMode is the kernel's mode as Go prints it, and so as the contract does.
func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFIFO:
		m |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		m |= fs.ModeSocket
	case unix.S_IFBLK:
		m |= fs.ModeDevice
	case unix.S_IFCHR:
		m |= fs.ModeDevice | fs.ModeCharDevice
	}
	if mode&unix.S_ISUID != 0 {
		m |= fs.ModeSetuid
	}
	if mode&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if mode&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	return m
}
