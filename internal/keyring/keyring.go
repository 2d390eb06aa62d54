// Package keyring seals small values under keys of a file: AES-256-GCM, with a
// key that is named beside each value, so that another key can be added at any
// time. None is ever removed: a backup of what was sealed may need it.
package keyring

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// Ring is a set of keys in a file of mode 0600. The newest seals, all open. It
// is safe for concurrent use, also by several processes: a key that another
// process has added is found when it is needed, and used from the next seal on.
type Ring struct {
	path string
	now  func() time.Time

	mu   sync.Mutex
	read fs.FileInfo // of the file as it was when keys was read
	keys []key       // oldest first
}

// file is the form of the file.
type file struct {
	Format int   `json:"format"`
	Keys   []key `json:"keys"`
}

type key struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	Secret  string    `json:"key"` // 32 bytes, base64

	aead cipher.AEAD
}

const format = 1

// Open reads the ring in a file, making one with one key if there is none. The
// directory must exist.
func Open(path string, now func() time.Time) (*Ring, error) {
	r := &Ring{path: path, now: now}
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.refresh()
	if errors.Is(err, fs.ErrNotExist) {
		_, err = r.add()
	}
	if err != nil {
		return nil, r.fail(err)
	}
	return r, nil
}

func (r *Ring) fail(err error) error {
	return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerStorage,
		Message: fmt.Sprintf("the keys of secrets in %s cannot be used: %v", r.path, err),
		Fix:     "restore the file from a backup; without it the values of secrets are lost and must be set anew", Err: err}
}

// refresh reads the file if it has changed. r.mu is held.
func (r *Ring) refresh() error {
	fi, err := os.Stat(r.path)
	if err != nil {
		return err
	}
	if r.read != nil && os.SameFile(fi, r.read) && fi.ModTime().Equal(r.read.ModTime()) {
		return nil
	}
	b, err := os.ReadFile(r.path)
	if err != nil {
		return err
	}
	var f file
	// The decoder's error is not passed on: it may quote what it has read.
	if json.Unmarshal(b, &f) != nil || len(f.Keys) == 0 {
		return errors.New("it does not hold a ring of keys")
	}
	if f.Format != format {
		return fmt.Errorf("its format is %d, and this version knows %d", f.Format, format)
	}
	for i := range f.Keys {
		if err := f.Keys[i].prepare(); err != nil {
			return err
		}
	}
	r.keys, r.read = f.Keys, fi
	return nil
}

func (k *key) prepare() error {
	b, err := base64.StdEncoding.DecodeString(k.Secret)
	if err != nil || len(b) != 32 || k.ID == "" {
		return fmt.Errorf("key %q is not 32 bytes in base64 with an ID", k.ID)
	}
	block, err := aes.NewCipher(b)
	if err != nil {
		return err
	}
	k.aead, err = cipher.NewGCM(block)
	return err
}

// add makes a key and writes the file. r.mu is held.
func (r *Ring) add() (string, error) {
	secret, id := make([]byte, 32), make([]byte, 6)
	rand.Read(secret)
	rand.Read(id)
	k := key{ID: "k" + hex.EncodeToString(id), Created: r.now().UTC().Truncate(time.Second), Secret: base64.StdEncoding.EncodeToString(secret)}
	if err := k.prepare(); err != nil {
		return "", err
	}
	keys := append(r.keys[:len(r.keys):len(r.keys)], k)
	return k.ID, r.write(keys)
}

// write replaces the file, whole or not at all. r.mu is held.
func (r *Ring) write(keys []key) error {
	b, err := json.MarshalIndent(file{format, keys}, "", "  ")
	if err != nil {
		return err
	}
	if err := wholefile.Write(r.path, append(b, '\n'), 0o600); err != nil {
		return err
	}
	// A key that is not on the disk must not have sealed anything.
	dir, err := os.Open(filepath.Dir(r.path))
	if err != nil {
		return err
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return err
	}
	fi, err := os.Stat(r.path)
	if err != nil {
		return err
	}
	r.keys, r.read = keys, fi
	return nil
}

// Current names the key that seals now.
func (r *Ring) Current() (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.refresh(); err != nil {
		return "", r.fail(err)
	}
	return r.keys[len(r.keys)-1].ID, nil
}

// Add makes a new key, which seals from now on, and returns its name. What
// older keys have sealed can still be opened.
func (r *Ring) Add() (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.refresh(); err != nil {
		return "", r.fail(err)
	}
	id, err := r.add()
	if err != nil {
		return "", r.fail(err)
	}
	return id, nil
}

// Seal encrypts a value. Context says what the value is for: it must be the
// same when it is opened, and is not kept.
func (r *Ring) Seal(context string, value cay.Secret) (id string, sealed []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.refresh(); err != nil {
		return "", nil, r.fail(err)
	}
	k := r.keys[len(r.keys)-1]
	nonce := make([]byte, k.aead.NonceSize(), k.aead.NonceSize()+len(value)+k.aead.Overhead())
	rand.Read(nonce) // random: 2^32 values under one key are safe, and a version is one
	return k.ID, k.aead.Seal(nonce, nonce, []byte(value.Reveal()), []byte(context)), nil
}

// Open decrypts what Seal made under the key with the ID, for the same context.
// A key that is not there, a value that was altered or is another's, is
// cay.CodeObjectCorrupt.
func (r *Ring) Open(context, id string, sealed []byte) (cay.Secret, error) {
	bad := func(why string) error {
		return &cay.Error{Code: cay.CodeObjectCorrupt, Layer: cay.LayerStorage,
			Message: "the value of a secret cannot be opened: " + why, Fix: "set the secret again, or restore " + r.path + " from a backup"}
	}
	r.mu.Lock()
	k, ok := r.find(id)
	if !ok {
		if err := r.refresh(); err != nil {
			r.mu.Unlock()
			return "", r.fail(err)
		}
		k, ok = r.find(id)
	}
	r.mu.Unlock()
	if !ok {
		return "", bad("there is no key " + id)
	}
	if len(sealed) < k.aead.NonceSize() {
		return "", bad("it is too short")
	}
	value, err := k.aead.Open(nil, sealed[:k.aead.NonceSize()], sealed[k.aead.NonceSize():], []byte(context))
	if err != nil {
		return "", bad("it was altered, or is another's")
	}
	return cay.Secret(value), nil
}

func (r *Ring) find(id string) (key, bool) {
	for _, k := range r.keys {
		if k.ID == id {
			return k, true
		}
	}
	return key{}, false
}
