package orchestrator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// A small file of a snapshot ends with a line that holds the digest of what is
// before it, so that no damage of it goes unseen.
const sealPrefix = "sha256:"

// seal appends the line.
func seal(b []byte) []byte {
	sum := sha256.Sum256(b)
	return append(b, sealPrefix+hex.EncodeToString(sum[:])+"\n"...)
}

// unseal takes it off, and says what is wrong with it.
func unseal(b []byte) ([]byte, error) {
	at := len(b) - len(sealPrefix) - 2*sha256.Size - 1
	if at < 0 {
		return nil, fmt.Errorf("it has %d bytes, fewer than its digest", len(b))
	}
	if !bytes.Equal(seal(b[:at:at])[at:], b[at:]) {
		return nil, errors.New("its digest is not that of its content")
	}
	return b[:at], nil
}

const (
	// checkBlock is what one checksum is of.
	checkBlock = 64 << 10
	// checkAtOnce is how much a disk may hold, in bytes, to be read in full at
	// each save and before each start: a few milliseconds beside those of the
	// memory.
	checkAtOnce = 32 << 20
	checkPrefix = "crc32c-64k:"
	// readSize is how much is read at a time, a multiple of checkBlock.
	readSize = 16 * checkBlock
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checkOf reads all that a sparse file holds and returns a checksum of it: the
// digest of the CRC-32C of every block that is not empty, and of their places.
// It sees any damage of up to 32 bits in a row in a block, and any other but for
// one in four thousand millions; it is no proof against forgery. After every
// 16 MiB it calls pause, if that is set, with how long they took.
func checkOf(ctx context.Context, path string, pause func(time.Duration)) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	sums := newBlockSums()
	buf := make([]byte, readSize)
	began, read := time.Now(), 0
	for at := int64(0); at < fi.Size(); {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole is left
		}
		if err != nil {
			return "", fmt.Errorf("looking for data in %s: %w", path, err)
		}
		end, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return "", fmt.Errorf("looking for a hole in %s: %w", path, err)
		}
		for at = data / checkBlock * checkBlock; at < end; {
			if err := ctx.Err(); err != nil {
				return "", err
			}
			n, err := f.ReadAt(buf[:min(int64(len(buf)), (end-at+checkBlock-1)/checkBlock*checkBlock)], at)
			if err != nil && !errors.Is(err, io.EOF) {
				return "", fmt.Errorf("reading %s: %w", path, err)
			}
			if n == 0 {
				return "", fmt.Errorf("reading %s: it became shorter", path)
			}
			sums.add(at, buf[:n])
			at += int64((n + checkBlock - 1) / checkBlock * checkBlock)
			if read += n; read >= 16<<20 && pause != nil {
				_ = unix.Fadvise(int(f.Fd()), 0, at, unix.FADV_DONTNEED) // nobody needs it soon
				pause(time.Since(began))
				began, read = time.Now(), 0
			}
		}
	}
	return sums.String(), nil
}

// blockSums is the checksum of a file in the making.
type blockSums struct{ sums hash.Hash }

func newBlockSums() blockSums { return blockSums{sha256.New()} }

// add adds what a file has at a place, which is a multiple of checkBlock. All but
// the file's last piece have a length that is one, too.
func (s blockSums) add(at int64, data []byte) {
	var entry [12]byte
	for len(data) > 0 {
		block := data[:min(len(data), checkBlock)]
		if !empty(block) { // else it is as good as a hole
			binary.BigEndian.PutUint64(entry[:8], uint64(at))
			binary.BigEndian.PutUint32(entry[8:], crc32.Checksum(block, castagnoli))
			s.sums.Write(entry[:])
		}
		at += int64(len(block))
		data = data[len(block):]
	}
}

func (s blockSums) String() string { return checkPrefix + hex.EncodeToString(s.sums.Sum(nil)) }

// checkSmall is checkOf for a disk that is not too large to be read in full at
// each start, and empty for another.
func checkSmall(ctx context.Context, path string) (string, error) {
	if n, err := held(path); err != nil || n > checkAtOnce {
		return "", err
	}
	return checkOf(ctx, path, nil)
}

func empty(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// held is how many bytes a sparse file holds.
func held(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Blocks * 512, nil
}

// checkName is the file with the checksum of a disk that was too large to be
// read when it was saved.
const checkName = "disk.check"

// checkOfDisk is the checksum that the saved disk of a snapshot has to have;
// empty if there is none yet.
func (s snapshots) checkOfDisk(m cay.Snapshot) (string, error) {
	if m.Disk.Check != "" {
		return m.Disk.Check, nil
	}
	b, err := os.ReadFile(s.path(m.ID, checkName))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err == nil {
		b, err = unseal(b)
	}
	if err != nil {
		return "", errCorrupt(m.ID, checkName, err.Error(), err)
	}
	return string(b), nil
}

// checkContent reads a part of a snapshot and compares it with its checksum.
func checkContent(ctx context.Context, id cay.SnapshotID, part, file, want string) error {
	got, err := checkOf(ctx, file, nil)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return errCorrupt(id, part, err.Error(), err)
	}
	if got != want {
		return errCorrupt(id, part, "its content is not what was saved", nil)
	}
	return nil
}

const (
	// lookAfter is how long a large disk is left alone after its save: most
	// snapshots live shorter.
	lookAfter = 2 * time.Minute
	lookEvery = time.Minute
	// restFactor is how much longer than it reads the reader rests.
	restFactor = 3
)

// checkLarge makes the checksums of saved disks that were too large to be read
// when they were saved, one after the other and slowly, until ctx ends.
func (o *Orchestrator) checkLarge(ctx context.Context) {
	rest := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	for ctx.Err() == nil {
		rest(lookEvery)
		all, _ := o.snapshots.list() // those that cannot be read are told of elsewhere
		for _, m := range all {
			if want, err := o.snapshots.checkOfDisk(m); err != nil || want != "" || o.now().Sub(m.CreatedAt) < lookAfter || ctx.Err() != nil {
				continue
			}
			if err := o.checkOne(ctx, m, func(took time.Duration) { rest(restFactor * took) }); err != nil && ctx.Err() == nil {
				o.log().Warn("the disk of a snapshot has no checksum yet", "snapshot", m.ID, "error", err)
			}
		}
	}
}

// checkOne makes the checksum of one disk. The stamp, before and after, tells
// that it is of what was saved.
func (o *Orchestrator) checkOne(ctx context.Context, m cay.Snapshot, rest func(time.Duration)) error {
	saved, err := o.Disks.FindSaved(string(m.ID))
	if err != nil {
		return err
	}
	if err := checkDisk(m, saved.File); err != nil {
		return err
	}
	sum, err := checkOf(ctx, saved.File, rest)
	if err != nil {
		return err
	}
	if err := checkDisk(m, saved.File); err != nil {
		return err
	}
	path := o.snapshots.path(m.ID, checkName)
	tmp := path + newSuffix
	if err := errors.Join(os.WriteFile(tmp, seal([]byte(sum)), 0o600), syncPath(tmp)); err != nil {
		return errors.Join(storageError("write the checksum of snapshot "+string(m.ID), err), os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return storageError("publish the checksum of snapshot "+string(m.ID), err)
	}
	return syncPath(filepath.Dir(path))
}
