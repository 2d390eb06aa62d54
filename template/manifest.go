package template

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/internal/ctxio"
)

// KindEROFS is the kind of every layer of this version.
const KindEROFS = "erofs"

// maxManifest bounds what is read before anything is known about it.
const maxManifest = 1 << 20

// LayerKey is where a layer is stored.
func LayerKey(d cay.Digest) blob.Key {
	algo, sum, _ := strings.Cut(string(d), ":")
	return blob.Key("layers/" + algo + "/" + sum)
}

// ManifestKey is where the manifest of a finished build is stored. The object
// is written last: without it there is no build.
func ManifestKey(b cay.BuildID) blob.Key { return blob.Key("builds/" + string(b) + "/manifest.json") }

// candidateKey is where the manifest of a build is while it is verified.
func candidateKey(b cay.BuildID) blob.Key {
	return blob.Key("candidates/" + string(b) + "/manifest.json")
}

var (
	validBuild  = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	validDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// Load returns the manifest of a finished build after checking that this
// version and machine can use it and that every layer is stored with its size.
//
// Errors: cay.CodeTemplateNotFound when the build has no manifest and no trace
// of one can exist, that is, the ID is malformed; cay.CodeTemplateIncomplete,
// with the part in Detail["part"], when the manifest or a layer is missing;
// cay.CodeTemplateInvalid when the manifest cannot be used;
// cay.CodeObjectCorrupt when a layer has another size.
func Load(ctx context.Context, s blob.Store, b cay.BuildID) (cay.Manifest, error) {
	return load(ctx, s, b, ManifestKey(b))
}

// LoadCandidate is [Load] for the node: it also finds a build that is being
// verified. Only the builder knows the ID of such a build.
func LoadCandidate(ctx context.Context, s blob.Store, b cay.BuildID) (cay.Manifest, error) {
	m, err := Load(ctx, s, b)
	var e *cay.Error
	if errors.As(err, &e) && e.Code == cay.CodeTemplateIncomplete && e.Detail["part"] == "manifest" {
		if c, cerr := load(ctx, s, b, candidateKey(b)); cerr == nil {
			return c, nil
		}
	}
	return m, err
}

func load(ctx context.Context, s blob.Store, b cay.BuildID, key blob.Key) (cay.Manifest, error) {
	if !validBuild.MatchString(string(b)) {
		return cay.Manifest{}, &cay.Error{Code: cay.CodeTemplateNotFound, Layer: cay.LayerTemplate,
			Message: fmt.Sprintf("the build ID %q is malformed", b), Fix: "list the builds with `cay template list`"}
	}
	r, _, err := s.Open(ctx, key)
	if err != nil {
		return cay.Manifest{}, missingPart(err, b, "manifest", key)
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return cay.Manifest{}, fmt.Errorf("read the manifest of build %s: %w", b, err)
	}
	m, err := parseManifest(text, b)
	if err != nil {
		return cay.Manifest{}, &cay.Error{Code: cay.CodeTemplateInvalid, Layer: cay.LayerTemplate,
			Message: fmt.Sprintf("the manifest of build %s cannot be used: %v", b, err),
			Fix:     "build the template again with this version: `cay template build`",
			Detail:  map[string]string{"build": string(b), "part": "manifest", "key": string(key)}, Err: err}
	}
	for i, l := range m.Layers {
		part := fmt.Sprintf("layer %d of %d", i+1, len(m.Layers))
		o, err := s.Stat(ctx, LayerKey(l.Digest))
		if err != nil {
			return cay.Manifest{}, missingPart(err, b, part, LayerKey(l.Digest))
		}
		if o.SizeBytes != l.SizeBytes {
			return cay.Manifest{}, &cay.Error{Code: cay.CodeObjectCorrupt, Layer: cay.LayerStorage,
				Message: fmt.Sprintf("%s of build %s has %d bytes, its manifest says %d", part, b, o.SizeBytes, l.SizeBytes),
				Fix:     "build the template again: `cay template build`",
				Detail:  map[string]string{"build": string(b), "part": part, "key": string(LayerKey(l.Digest)), "digest": string(l.Digest)}}
		}
	}
	return m, nil
}

// missingPart names the part of a build that the store does not have. Other
// failures of the store pass.
func missingPart(err error, b cay.BuildID, part string, key blob.Key) error {
	if cay.CodeOf(err) != cay.CodeObjectMissing {
		return fmt.Errorf("look up %s of build %s: %w", part, b, err)
	}
	return &cay.Error{Code: cay.CodeTemplateIncomplete, Layer: cay.LayerTemplate,
		Message: fmt.Sprintf("build %s is incomplete: its %s is missing (%s)", b, part, key),
		Fix:     "build the template again: `cay template build`",
		Detail:  map[string]string{"build": string(b), "part": part, "key": string(key)}, Err: err}
}

// parseManifest reads and checks a manifest; it knows nothing of the store.
func parseManifest(text []byte, b cay.BuildID) (cay.Manifest, error) {
	if len(text) > maxManifest {
		return cay.Manifest{}, fmt.Errorf("it is larger than %d bytes", maxManifest)
	}
	var m cay.Manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return cay.Manifest{}, err
	}
	switch {
	case m.Format != cay.ManifestFormat:
		return cay.Manifest{}, fmt.Errorf("its format is %d, this version reads %d", m.Format, cay.ManifestFormat)
	case m.Build != b:
		return cay.Manifest{}, fmt.Errorf("it belongs to build %q", m.Build)
	case m.Arch != runtime.GOARCH:
		return cay.Manifest{}, fmt.Errorf("it is for %q, this machine is %s", m.Arch, runtime.GOARCH)
	case m.Init == "" || m.Init[0] != '/':
		return cay.Manifest{}, fmt.Errorf("its init %q is no absolute path", m.Init)
	case !validDigest.MatchString(string(m.Envd)):
		return cay.Manifest{}, fmt.Errorf("its envd digest %q is malformed", m.Envd)
	case len(m.Layers) < 2:
		return cay.Manifest{}, fmt.Errorf("it has %d layers, need a system and an agent", len(m.Layers))
	}
	for _, l := range m.Layers {
		switch {
		case !validDigest.MatchString(string(l.Digest)):
			return cay.Manifest{}, fmt.Errorf("the layer digest %q is malformed", l.Digest)
		case l.Kind != KindEROFS:
			return cay.Manifest{}, fmt.Errorf("the layer %s is of kind %q, this version reads %s", l.Digest, l.Kind, KindEROFS)
		case l.SizeBytes <= 0:
			return cay.Manifest{}, fmt.Errorf("the layer %s has %d bytes", l.Digest, l.SizeBytes)
		}
	}
	return m, nil
}

// Verify reads every layer of a build and compares its digest. The error is
// cay.CodeObjectCorrupt and names the layer.
func Verify(ctx context.Context, s blob.Store, m cay.Manifest) error {
	for i, l := range m.Layers {
		part := fmt.Sprintf("layer %d of %d", i+1, len(m.Layers))
		r, _, err := s.Open(ctx, LayerKey(l.Digest))
		if err != nil {
			return missingPart(err, m.Build, part, LayerKey(l.Digest))
		}
		d, n, err := digestOf(ctx, r)
		r.Close()
		if err != nil {
			return fmt.Errorf("read %s of build %s: %w", part, m.Build, err)
		}
		if d != l.Digest || n != l.SizeBytes {
			return &cay.Error{Code: cay.CodeObjectCorrupt, Layer: cay.LayerStorage,
				Message: fmt.Sprintf("%s of build %s is corrupt: its content has the digest %s", part, m.Build, d),
				Fix:     "check the disk under the data directory, then build the template again",
				Detail:  map[string]string{"build": string(m.Build), "part": part, "want": string(l.Digest), "got": string(d)}}
		}
	}
	return nil
}

// digestOf reads r to its end.
func digestOf(ctx context.Context, r io.Reader) (cay.Digest, int64, error) {
	h := sha256.New()
	n, err := io.CopyBuffer(h, ctxio.Reader(ctx, r), make([]byte, 1<<20))
	if err != nil {
		return "", n, err
	}
	return cay.Digest("sha256:" + hex.EncodeToString(h.Sum(nil))), n, nil
}

// DigestBytes returns the content address of b.
func DigestBytes(b []byte) cay.Digest {
	sum := sha256.Sum256(b)
	return cay.Digest("sha256:" + hex.EncodeToString(sum[:]))
}

// File is a layer as a file of this machine.
type File struct {
	Digest cay.Digest
	Path   string
}

// Files returns the files of a build's layers, lowest first. The store must
// keep its objects as files.
func Files(ctx context.Context, s blob.Store, m cay.Manifest) ([]File, error) {
	local, ok := s.(blob.Local)
	if !ok {
		return nil, &cay.Error{Code: cay.CodeNotImplemented, Layer: cay.LayerStorage,
			Message: "layers can only be used from an artefact store on this machine", Fix: "use the file store"}
	}
	files := make([]File, 0, len(m.Layers))
	for i, l := range m.Layers {
		p, err := local.Path(ctx, LayerKey(l.Digest))
		if err != nil {
			return nil, missingPart(err, m.Build, fmt.Sprintf("layer %d of %d", i+1, len(m.Layers)), LayerKey(l.Digest))
		}
		files = append(files, File{Digest: l.Digest, Path: p})
	}
	return files, nil
}

func encodeManifest(m cay.Manifest) (io.Reader, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode the manifest: %w", err)
	}
	return bytes.NewReader(append(b, '\n')), nil
}

// sameLayers reports whether two builds have the same content.
func sameLayers(a, b []cay.ImageLayer) bool { return slices.Equal(a, b) }
