// Package blob is the contract of artefact storage: root file system layers,
// build manifests, later memory images and disks.
package blob

import (
	"context"
	"io"
	"time"
)

// Key is a slash-separated path of [A-Za-z0-9._-] segments, none of them "."
// or "..", at most 512 bytes: "layers/sha256/<hex>", "builds/<id>/manifest.json".
type Key string

// Object describes a stored object.
type Object struct {
	Key       Key
	SizeBytes int64
	Modified  time.Time
}

// Store keeps immutable objects.
//
// A missing object is cay.CodeObjectMissing with the key in Detail["key"];
// a full disk is cay.CodeDiskFull. Safe for concurrent use.
type Store interface {
	// Put stores r under the key, atomically and durably: after a nil return
	// the object survives a power cut; after an error, or a crash, no object
	// or the old one is there. It replaces an existing object.
	Put(ctx context.Context, k Key, r io.Reader) (Object, error)
	// Open returns a reader at the start of the object.
	Open(ctx context.Context, k Key) (io.ReadCloser, Object, error)
	Stat(ctx context.Context, k Key) (Object, error)
	// List returns the objects whose key starts with the prefix, by key.
	List(ctx context.Context, prefix string) ([]Object, error)
	// Delete removes the object; an absent one is no error.
	Delete(ctx context.Context, k Key) error
}

// Local is implemented by stores whose objects are files on this machine.
type Local interface {
	// Path returns the file of an object that exists.
	Path(ctx context.Context, k Key) (string, error)
}
