package blobtest

import (
	"bytes"
	"context"
	"io"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
)

// Memory is a [blob.Store] in memory. The zero value is ready.
//
// Fail, if set, is asked before each operation ("put", "open", "stat", "list",
// "delete") and its error is returned, so that a test can break any step.
type Memory struct {
	Fail func(op string, k blob.Key) error

	mu      sync.Mutex
	objects map[blob.Key][]byte
	times   map[blob.Key]time.Time
}

func (m *Memory) check(op string, k blob.Key) error {
	if m.Fail == nil {
		return nil
	}
	return m.Fail(op, k)
}

func validKey(k blob.Key) error {
	ok := len(k) > 0 && len(k) <= 512
	for seg := range strings.SplitSeq(string(k), "/") {
		ok = ok && seg != "" && seg != "." && seg != ".."
		ok = ok && strings.Trim(seg, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == ""
	}
	if ok {
		return nil
	}
	return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerStorage, Message: "bad object key",
		Detail: map[string]string{"key": string(k)}}
}

func missingError(k blob.Key) error {
	return &cay.Error{Code: cay.CodeObjectMissing, Layer: cay.LayerStorage,
		Message: "the artefact " + string(k) + " is not in the store",
		Detail:  map[string]string{"key": string(k), "provider": "memory"}}
}

// Put implements [blob.Store].
func (m *Memory) Put(ctx context.Context, k blob.Key, r io.Reader) (blob.Object, error) {
	if err := validKey(k); err != nil {
		return blob.Object{}, err
	}
	if err := m.check("put", k); err != nil {
		return blob.Object{}, err
	}
	b, err := io.ReadAll(r)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return blob.Object{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.objects == nil {
		m.objects, m.times = map[blob.Key][]byte{}, map[blob.Key]time.Time{}
	}
	m.objects[k], m.times[k] = b, time.Now()
	return blob.Object{Key: k, SizeBytes: int64(len(b)), Modified: m.times[k]}, nil
}

// Open implements [blob.Store].
func (m *Memory) Open(ctx context.Context, k blob.Key) (io.ReadCloser, blob.Object, error) {
	if err := m.check("open", k); err != nil {
		return nil, blob.Object{}, err
	}
	o, err := m.stat(k)
	if err != nil {
		return nil, blob.Object{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return io.NopCloser(bytes.NewReader(m.objects[k])), o, nil
}

func (m *Memory) stat(k blob.Key) (blob.Object, error) {
	if err := validKey(k); err != nil {
		return blob.Object{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.objects[k]
	if !ok {
		return blob.Object{}, missingError(k)
	}
	return blob.Object{Key: k, SizeBytes: int64(len(b)), Modified: m.times[k]}, nil
}

// Stat implements [blob.Store].
func (m *Memory) Stat(ctx context.Context, k blob.Key) (blob.Object, error) {
	if err := m.check("stat", k); err != nil {
		return blob.Object{}, err
	}
	return m.stat(k)
}

// List implements [blob.Store].
func (m *Memory) List(ctx context.Context, prefix string) ([]blob.Object, error) {
	if err := m.check("list", blob.Key(prefix)); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []blob.Object
	for k, b := range m.objects {
		if strings.HasPrefix(string(k), prefix) {
			out = append(out, blob.Object{Key: k, SizeBytes: int64(len(b)), Modified: m.times[k]})
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Key < out[j].Key })
	return out, nil
}

// Delete implements [blob.Store].
func (m *Memory) Delete(ctx context.Context, k blob.Key) error {
	if err := validKey(k); err != nil {
		return err
	}
	if err := m.check("delete", k); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.objects, k)
	return nil
}

// Corrupt flips one bit of an object, for tests of verification. It reports
// whether the object was there and not empty.
func (m *Memory) Corrupt(k blob.Key, offset int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.objects[k]
	if len(b) == 0 {
		return false
	}
	c := bytes.Clone(b)
	c[offset%len(c)] ^= 1
	m.objects[k] = c
	return true
}
