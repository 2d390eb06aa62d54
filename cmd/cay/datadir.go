package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// dataDir is the directory that holds everything Cay keeps.
type dataDir string

func (d dataDir) path(elem ...string) string {
	return filepath.Join(append([]string{string(d)}, elem...)...)
}

func (d dataDir) pidFile() string         { return d.path("cay.pid") }
func (d dataDir) lockFile() string        { return d.path("cay.lock") }
func (d dataDir) credentialsFile() string { return d.path("credentials.json") }
func (d dataDir) keysFile() string        { return d.path("secrets.keys") }
func (d dataDir) serverFile() string      { return d.path("server.json") }

// credentials are generated once for a data directory, in a file of mode 0600.
type credentials struct {
	TeamID     string `json:"teamID"`
	AdminToken string `json:"adminToken"` // X-Admin-Token
	APIKey     string `json:"apiKey"`     // X-API-Key of the generated team
	Pepper     string `json:"pepper"`     // keys are kept as HMACs under it
	Seed       string `json:"seed"`       // sandbox tokens are derived from it
}

// serverInfo says where the server of a data directory listens. It is written
// when the server is ready and removed when it stops.
type serverInfo struct {
	PID      int    `json:"pid"`
	Version  string `json:"version"`
	APIURL   string `json:"apiURL"`
	ProxyURL string `json:"proxyURL"`
	// Domain is that of sandbox URLs over HTTPS, with a port unless it is 443,
	// and CAFile the authority that vouches for it, if it is our own.
	Domain    string    `json:"domain,omitempty"`
	CAFile    string    `json:"caFile,omitempty"`
	TLSAddr   string    `json:"tlsAddr,omitempty"`
	StartedAt time.Time `json:"startedAt"`
}

// openDataDir makes the directory if needed and takes its lock, which is held
// until the returned function is called or the process ends.
func openDataDir(path string) (dataDir, func(), error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", nil, errDataDir(path, err)
	}
	d := dataDir(abs)
	if err := os.MkdirAll(abs, 0o711); err != nil {
		return "", nil, errDataDir(abs, err)
	}
	f, err := os.OpenFile(d.lockFile(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", nil, errDataDir(abs, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return "", nil, errDataDir(abs, err)
		}
		return "", nil, errLocked(d)
	}
	return d, func() { f.Close() }, nil
}

func errDataDir(path string, err error) error {
	e := &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerHost,
		Message: fmt.Sprintf("the data directory %s cannot be used: %v", path, err),
		Fix:     "check that it is a directory root may write, or name another with --data-dir", Err: err}
	switch {
	case errors.Is(err, syscall.ENOSPC):
		e.Code, e.Layer = cay.CodeDiskFull, cay.LayerStorage
		e.Message = fmt.Sprintf("the disk under the data directory %s is full", path)
		e.Fix = "free space there, or name another directory with --data-dir"
	case errors.Is(err, fs.ErrPermission):
		e.Code = cay.CodePrivilege
		e.Fix = "run as root, or name a directory you own with --data-dir"
	}
	return e
}

func errLocked(d dataDir) error {
	who, pid := "another process", 0
	if pid = d.readPID(); pid > 0 {
		who = fmt.Sprintf("process %d (%s)", pid, commandOf(pid))
	}
	return &cay.Error{Code: cay.CodeDataDirLocked, Layer: cay.LayerHost,
		Message: fmt.Sprintf("the data directory %s is in use by %s", d, who),
		Fix:     fmt.Sprintf("use that server, stop it with `cay down --data-dir %s`, or name another directory with --data-dir", d),
		Detail:  map[string]string{"pid": strconv.Itoa(pid)}}
}

// readPID returns the server's process ID, or 0.
func (d dataDir) readPID() int {
	b, err := os.ReadFile(d.pidFile())
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return pid
}

func commandOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return "gone"
	}
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

// loadCredentials reads the generated credentials, making them for a fresh
// directory.
func (d dataDir) loadCredentials() (credentials, error) {
	c, err := d.readCredentials()
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return c, err
	}
	c = credentials{TeamID: uuid.NewString(), AdminToken: "cay_admin_" + randomHex(24),
		APIKey: "e2b_" + randomHex(20), Pepper: randomHex(32), Seed: randomHex(32)}
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return c, err
	}
	if err := wholefile.Write(d.credentialsFile(), append(b, '\n'), 0o600); err != nil {
		return c, errDataDir(string(d), err)
	}
	return c, nil
}

// readCredentials reads the credentials of an existing directory.
func (d dataDir) readCredentials() (credentials, error) {
	var c credentials
	b, err := os.ReadFile(d.credentialsFile())
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(b, &c); err != nil || c.APIKey == "" || c.Seed == "" || c.Pepper == "" {
		return c, &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerHost,
			Message: fmt.Sprintf("the credentials file %s is damaged", d.credentialsFile()),
			Fix:     "restore it from a backup; a new one would make every key and sandbox token invalid", Err: err}
	}
	return c, nil
}

// readServer reads where the server listens.
func (d dataDir) readServer() (serverInfo, error) {
	var s serverInfo
	b, err := os.ReadFile(d.serverFile())
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}
