package orchestrator

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/ctxio"
)

var _ cay.Archives = (*Orchestrator)(nil)

// An archive is a tar with these members, in this order:
//
//	archive.json             archiveHead
//	secrets.json             snapshotSecrets
//	memory/<name>@<offset>   a stretch of data of a file of the memory; offset
//	                         is hexadecimal, and what is between two is zero
//	disk@<offset>            the same of the disk
//	sums.json                archiveSums: no archive is whole without it
//
// The digests of the memory are in the manifest. The disk has none there, so
// that its sum is made here: of each stretch's offset and length, 8 bytes each,
// big-endian, and its data.
const (
	archiveFormat = 1
	archiveName   = "archive.json"
	diskName      = "disk"
	sumsName      = "sums.json"
)

// archiveHead says what is in an archive.
type archiveHead struct {
	Format   int          `json:"format"`
	Template string       `json:"template"` // its name
	Snapshot cay.Snapshot `json:"snapshot"`
}

// archiveSums are SHA-256, in hexadecimal.
type archiveSums struct {
	Head    string `json:"archive"`
	Secrets string `json:"secrets"`
	Disk    string `json:"disk"`
}

const (
	maxStretch  = 1 << 30 // bytes in one member; tar itself ends at 8 GiB
	maxJSON     = 1 << 20 // bytes of a member that is read as a whole
	tarBlock    = 512
	maxMemories = 64 // files of a memory
)

func sumOf(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// stretch is a range of a file that holds data.
type stretch struct{ offset, length int64 }

// stretches lists where a file has data.
func stretches(f *os.File) ([]stretch, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var out []stretch
	for pos := int64(0); pos < fi.Size(); {
		start, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // only a hole is left
			break
		}
		if err != nil {
			return nil, os.NewSyscallError("lseek", err)
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return nil, os.NewSyscallError("lseek", err)
		}
		for ; start < end; start += maxStretch {
			out = append(out, stretch{start, min(maxStretch, end-start)})
		}
		pos = end
	}
	return out, nil
}

// archive writes one snapshot.
type archive struct {
	id     cay.SnapshotID
	head   []byte
	secret []byte
	parts  []archivePart // the disk is the last
}

type archivePart struct {
	name string // of the members, before the @
	file *os.File
	data []stretch
	want cay.SnapshotPart
}

// OpenArchive implements [cay.Archives].
func (o *Orchestrator) OpenArchive(ctx context.Context, id cay.SnapshotID) (io.ReadCloser, int64, error) {
	m, secrets, err := o.snapshots.load(id)
	if err != nil {
		return nil, 0, err
	}
	manifest, _, err := o.Builds.Open(ctx, m.Build)
	if err != nil {
		return nil, 0, err
	}
	if err := errors.Join(o.checkSavedDisk(m), o.readSavedDisk(ctx, m, true)); err != nil {
		return nil, 0, err
	}
	a := &archive{id: id}
	paths := map[string]string{}
	for _, p := range m.Memory {
		name := memoryName + "/" + p.Name
		paths[name] = o.snapshots.path(id, memoryName, p.Name)
		a.parts = append(a.parts, archivePart{name: name, want: p})
	}
	saved, err := o.Disks.FindSaved(string(id))
	if err != nil {
		return nil, 0, err
	}
	paths[diskName] = saved.File
	a.parts = append(a.parts, archivePart{name: diskName, want: m.Disk})
	m.Disk.Stamp = "" // of the file that is here
	a.head, err = json.Marshal(archiveHead{Format: archiveFormat, Template: manifest.Name, Snapshot: m})
	if err == nil {
		a.secret, err = json.Marshal(secrets)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("encoding the manifest of snapshot %s: %w", id, err)
	}
	for i := range a.parts {
		p := &a.parts[i]
		if p.file, err = os.Open(paths[p.name]); err == nil {
			p.data, err = stretches(p.file)
		}
		if err != nil {
			a.close()
			return nil, 0, errCorrupt(id, p.want.Name, err.Error(), err)
		}
	}
	r, w := io.Pipe()
	go func() {
		defer a.close()
		w.CloseWithError(a.write(ctx, w))
	}()
	return r, a.size(), nil
}

func (a *archive) close() {
	for _, p := range a.parts {
		if p.file != nil {
			_ = p.file.Close() // it was only read
		}
	}
}

// size is that of the tar.
func (a *archive) size() int64 {
	member := func(n int64) int64 { return tarBlock + (n+tarBlock-1)/tarBlock*tarBlock }
	sums, _ := json.Marshal(archiveSums{sumOf(nil), sumOf(nil), sumOf(nil)}) // strings always encode
	n := member(int64(len(a.head))) + member(int64(len(a.secret))) + member(int64(len(sums))) + 2*tarBlock
	for _, p := range a.parts {
		for _, s := range p.data {
			n += member(s.length)
		}
	}
	return n
}

func (a *archive) write(ctx context.Context, w io.Writer) error {
	tw := tar.NewWriter(w)
	member := func(name string, n int64, r io.Reader) error {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: n, Format: tar.FormatUSTAR}); err != nil {
			return err
		}
		_, err := io.Copy(tw, r)
		return err
	}
	whole := func(name string, b []byte) error { return member(name, int64(len(b)), bytes.NewReader(b)) }
	if err := errors.Join(whole(archiveName, a.head), whole(secretsName, a.secret)); err != nil {
		return err
	}
	var last string
	for _, p := range a.parts {
		sum := newPartSum(p)
		for _, s := range p.data {
			sum.begin(s)
			r := io.TeeReader(ctxio.Reader(ctx, io.NewSectionReader(p.file, s.offset, s.length)), sum)
			if err := member(fmt.Sprintf("%s@%x", p.name, s.offset), s.length, r); err != nil {
				return fmt.Errorf("reading %s of snapshot %s: %w", p.want.Name, a.id, err)
			}
		}
		if last = sum.end(p.want.SizeBytes); p.want.Digest != "" && cay.Digest("sha256:"+last) != p.want.Digest {
			return errCorrupt(a.id, p.want.Name, "its digest is sha256:"+last+" instead of "+string(p.want.Digest), nil)
		}
	}
	sums, err := json.Marshal(archiveSums{Head: sumOf(a.head), Secrets: sumOf(a.secret), Disk: last})
	if err != nil {
		return err
	}
	return errors.Join(whole(sumsName, sums), tw.Close())
}

// partSum is the digest of a part while its stretches pass: of its content for a
// part with a digest, and else as the format says.
type partSum struct {
	hash.Hash
	content bool
	pos     int64
}

func newPartSum(p archivePart) *partSum {
	return &partSum{Hash: sha256.New(), content: p.want.Digest != ""}
}

// begin is called before the data of a stretch.
func (s *partSum) begin(at stretch) {
	if s.content {
		s.zeros(at.offset)
		s.pos += at.length
		return
	}
	s.Write(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(at.offset)), uint64(at.length)))
}

// zeros adds the hole before an offset.
func (s *partSum) zeros(to int64) {
	block := make([]byte, 1<<16)
	for ; s.pos < to; s.pos += int64(len(block)) {
		block = block[:min(int64(len(block)), to-s.pos)]
		s.Write(block)
	}
}

func (s *partSum) end(size int64) string {
	if s.content {
		s.zeros(size)
	}
	return hex.EncodeToString(s.Sum(nil))
}

// ReceiveArchive implements [cay.Archives].
func (o *Orchestrator) ReceiveArchive(ctx context.Context, id cay.SnapshotID, r io.Reader, accept func(cay.Snapshot, string) error) (cay.Snapshot, error) {
	if err := o.snapshots.free(id); err != nil {
		return cay.Snapshot{}, err
	}
	in := &archiveReader{tar: tar.NewReader(ctxio.Reader(ctx, r))}
	var head archiveHead
	if err := in.document(archiveName, &head); err != nil {
		return cay.Snapshot{}, err
	}
	m := head.Snapshot
	if err := o.fits(ctx, head); err != nil {
		return cay.Snapshot{}, err
	}
	if err := accept(m, head.Template); err != nil {
		return cay.Snapshot{}, err
	}
	m.ID = id
	o.mu.Lock()
	if !o.open {
		o.mu.Unlock()
		return m, errShuttingDown()
	}
	o.wg.Add(1)
	o.mu.Unlock()
	defer o.wg.Done()
	if err := o.receive(ctx, in, &m); err != nil {
		// Whatever ended it must not keep what it left from being removed.
		return m, errors.Join(err, o.dropUnsaved(context.WithoutCancel(ctx), id))
	}
	o.log().Info("snapshot received", "snapshot", id, "was", head.Snapshot.ID, "build", m.Build)
	return m, nil
}

// fits says why the snapshot of an archive is of no use here, if it is not.
func (o *Orchestrator) fits(ctx context.Context, h archiveHead) error {
	m := h.Snapshot
	switch {
	case h.Format != archiveFormat || m.Format != cay.SnapshotFormat:
		return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("the archive has format %d and its snapshot format %d; this build reads %d and %d", h.Format, m.Format, archiveFormat, cay.SnapshotFormat),
			Fix:     "use the version of Cay that wrote it"}
	case validSnapshotID(m.ID) != nil || m.Disk.SizeBytes <= 0 || len(m.Memory) > maxMemories:
		return errArchive(archiveName, "it does not describe a snapshot", nil)
	}
	for i, p := range m.Memory {
		twice := slices.ContainsFunc(m.Memory[:i], func(q cay.SnapshotPart) bool { return q.Name == p.Name })
		if p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/@\x00") || p.SizeBytes < 0 || p.Digest == "" || twice {
			return errArchive(archiveName, fmt.Sprintf("its file %q of the memory cannot be", p.Name), nil)
		}
	}
	if len(m.Memory) > 0 && (m.Runtime != o.runtimeName || !o.hasEngine(o.engineOf(m))) {
		return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerRuntime,
			Message: fmt.Sprintf("the memory in the archive was written by %s %s; this node has %s %s", m.Runtime, m.RuntimeVersion, o.runtimeName, o.engine.Version),
			Fix:     "import it where the version of Cay runs that wrote it; or export a snapshot without memory there, which every version reads"}
	}
	if _, _, err := o.Builds.Open(ctx, m.Build); err != nil {
		if cay.CodeOf(err) == cay.CodeTemplateNotFound {
			return &cay.Error{Code: cay.CodeTemplateNotFound, Layer: cay.LayerTemplate,
				Message: fmt.Sprintf("the snapshot in the archive was made from build %s of template %q (%s), which is not here", m.Build, h.Template, m.Template),
				Fix:     "import it on a server that has this very build: another build has other files below what the snapshot changed", Err: err}
		}
		return err
	}
	return nil
}

func errArchive(member, why string, err error) error {
	return &cay.Error{Code: cay.CodeSnapshotCorrupt, Layer: cay.LayerStorage,
		Message: fmt.Sprintf("member %s of the archive is damaged: %s", member, why), Fix: "copy or export it again; nothing was imported",
		Detail: map[string]string{"part": member}, Err: err}
}

// receive reads the rest of an archive and makes the snapshot visible.
func (o *Orchestrator) receive(ctx context.Context, in *archiveReader, m *cay.Snapshot) error {
	var secrets snapshotSecrets
	if err := in.document(secretsName, &secrets); err != nil {
		return err
	}
	if secrets.ControlToken == "" {
		return errArchive(secretsName, "it lacks the token of the guest's daemon", nil)
	}
	unwatched := func(string) error { return nil }
	memory, err := o.snapshots.begin(m.ID, unwatched)
	if err != nil {
		return err
	}
	for _, p := range m.Memory {
		part := archivePart{name: memoryName + "/" + p.Name, want: p}
		f, err := os.OpenFile(filepath.Join(memory, p.Name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return storageError("write the memory of snapshot "+string(m.ID), err)
		}
		sum, err := in.file(part, f)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		if got := cay.Digest("sha256:" + sum); got != p.Digest {
			return errArchive(part.name, "its digest is "+string(got)+" instead of "+string(p.Digest), nil)
		}
	}
	var diskSum string
	saved, err := o.Disks.Receive(ctx, string(m.ID), func(f *os.File) (err error) {
		diskSum, err = in.file(archivePart{name: diskName, want: cay.SnapshotPart{SizeBytes: m.Disk.SizeBytes}}, f)
		return err
	})
	if err != nil {
		return err
	}
	head, secret := in.sums[archiveName], in.sums[secretsName]
	var sums archiveSums
	if err := in.document(sumsName, &sums); err != nil {
		return err
	}
	if got := (archiveSums{head, secret, diskSum}); got != sums {
		return errArchive(sumsName, fmt.Sprintf("the sums are %+v instead of %+v", got, sums), nil)
	}
	check := m.Disk.Check
	if m.Disk, err = stamp(saved.File); err == nil {
		m.Disk.Check, err = checkSmall(ctx, saved.File)
	}
	if err != nil {
		return storageError("look at the saved disk of snapshot "+string(m.ID), err)
	}
	if check != "" && m.Disk.Check != "" && check != m.Disk.Check {
		return errArchive(diskName, "its content is not what was saved", nil)
	}
	if len(m.Memory) > 0 {
		if err := o.snapshots.keepMemory(m.ID, unwatched); err != nil {
			return err
		}
	}
	return o.snapshots.commit(*m, secrets, unwatched)
}

// archiveReader reads the members of an archive.
type archiveReader struct {
	tar  *tar.Reader
	next *tar.Header // read ahead, or nil
	sums map[string]string
}

// peek returns the header of the next member.
func (a *archiveReader) peek() (*tar.Header, error) {
	if a.next != nil {
		return a.next, nil
	}
	h, err := a.tar.Next()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, errArchive(sumsName, "the archive ends before it", err)
	case errors.Is(err, tar.ErrHeader):
		return nil, errArchive("header", "this is not a tar archive, or it is damaged here", err)
	case err != nil:
		return nil, fmt.Errorf("reading the archive: %w", err)
	case h.Typeflag != tar.TypeReg || h.Size < 0:
		return nil, errArchive(h.Name, "it is no file", nil)
	}
	a.next = h
	return h, nil
}

// document reads a member that holds JSON.
func (a *archiveReader) document(name string, into any) error {
	h, err := a.peek()
	if err != nil {
		return err
	}
	if h.Name != name || h.Size > maxJSON {
		return errArchive(name, fmt.Sprintf("member %q of %d bytes is in its place", h.Name, h.Size), nil)
	}
	b, err := io.ReadAll(a.tar)
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return errArchive(name, err.Error(), err)
	}
	if a.sums == nil {
		a.sums = map[string]string{}
	}
	a.next, a.sums[name] = nil, sumOf(b)
	return nil
}

// file reads the stretches of a part into a file, and returns its sum.
func (a *archiveReader) file(p archivePart, f *os.File) (string, error) {
	if err := f.Truncate(p.want.SizeBytes); err != nil {
		return "", storageError("write "+p.name, err)
	}
	sum, end := newPartSum(p), int64(0)
	for {
		h, err := a.peek()
		if err != nil {
			return "", err
		}
		at, ours := strings.CutPrefix(h.Name, p.name+"@")
		if !ours {
			return sum.end(p.want.SizeBytes), nil
		}
		offset, err := strconv.ParseInt(at, 16, 64)
		if err != nil || offset < end || h.Size > p.want.SizeBytes-offset {
			return "", errArchive(h.Name, "it is outside of its file", err)
		}
		s := stretch{offset, h.Size}
		sum.begin(s)
		into := io.NewOffsetWriter(f, offset)
		if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(into, sum)}, struct{ io.Reader }{a.tar}, make([]byte, 1<<20)); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) {
				return "", errArchive(h.Name, "the archive ends in it", err)
			}
			return "", storageError("write "+h.Name+" of the archive", err)
		}
		end, a.next = offset+h.Size, nil
	}
}
