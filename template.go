package cay

import "time"

// TemplateID names a template: 20 characters of [a-z0-9].
type TemplateID string

// NewTemplateID returns a fresh random ID.
func NewTemplateID() TemplateID { return TemplateID(randomID(20)) }

// BuildID names one immutable result of building a template (a UUID).
type BuildID string

// Digest is a content address: "sha256:" and 64 lower-case hex characters.
type Digest string

// ManifestFormat is the number of the manifest's format. A reader refuses a
// number it does not know.
const ManifestFormat = 1

// Manifest is the whole truth about one build. It is written last and
// atomically: a build without a manifest does not exist. Nothing about a build
// is passed beside it.
type Manifest struct {
	Format    int        `json:"format"`
	Build     BuildID    `json:"build"`
	Template  TemplateID `json:"template"`
	Name      string     `json:"name"`
	CreatedAt time.Time  `json:"createdAt"`
	// Arch is the GOARCH of the guest.
	Arch string `json:"arch"`
	// Runtime and RuntimeVersion name the engine the build was verified with.
	Runtime        string `json:"runtime"`
	RuntimeVersion string `json:"runtimeVersion"`
	// Layers of the root file system, lowest first; the last one is the agent
	// layer, which holds PID 1 and envd.
	Layers []ImageLayer `json:"layers"`
	// Init is the path of PID 1 in the guest.
	Init string `json:"init"`
	// Envd is the digest of the envd binary in the agent layer; the guest
	// reports it and the node compares.
	Envd        Digest    `json:"envd"`
	EnvdVersion string    `json:"envdVersion"`
	Defaults    Defaults  `json:"defaults"`
	Resources   Resources `json:"resources"`
}

// ImageLayer is one read-only image of a root file system.
type ImageLayer struct {
	Digest    Digest `json:"digest"`
	SizeBytes int64  `json:"sizeBytes"`
	Kind      string `json:"kind"` // "erofs"
}

// Defaults are what a process in the guest gets when the client names nothing.
type Defaults struct {
	User    string            `json:"user"`
	Workdir string            `json:"workdir"` // empty is the user's home
	Env     map[string]string `json:"env,omitempty"`
}
