package envd

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"
)

// keptState is the configuration as it outlives a daemon that ended: in a file
// without a name, which PID 1 keeps open (Config.State). Without it, a daemon
// that is started again would have no token and be open to everybody.
type keptState struct {
	Env        map[string]string `json:"env"`
	Token      string            `json:"token"`
	User       string            `json:"user"`
	Workdir    string            `json:"workdir"`
	Lifecycle  string            `json:"lifecycle"`
	Generation string            `json:"generation"`
	Control    string            `json:"control"`
	Instance   string            `json:"instance"`
	Timestamp  time.Time         `json:"timestamp"`
	// Age is how old the guest was at Timestamp.
	Age time.Duration `json:"age"`
}

// stateHeader precedes the JSON: its length and its CRC-32, so that a daemon
// that died while writing leaves nothing that passes for a configuration.
const stateHeader = 8

// maxState bounds what is read back; it is more than an init may hold, in JSON.
const maxState = 8 * maxInit

// keep writes the configuration down. s.mu is held, so that the last is kept.
func (s *Server) keep() error {
	if s.cfg.State == nil {
		return nil
	}
	st := s.state
	k := keptState{Env: st.env, Token: st.token, User: st.user, Workdir: st.workdir,
		Lifecycle: st.lifecycle, Generation: st.generation, Control: st.control, Instance: st.instance, Timestamp: st.timestamp}
	if !st.timestamp.IsZero() {
		k.Age = sinceBoot() - time.Since(st.anchor)
	}
	text, err := json.Marshal(k)
	if err != nil {
		return fmt.Errorf("encoding the configuration: %w", err)
	}
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(text)))
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(text))
	if _, err := s.cfg.State.WriteAt(append(b, text...), 0); err != nil {
		return fmt.Errorf("keeping the configuration for an envd after this one: %w", err)
	}
	return nil
}

// recall takes over the configuration of the daemon before this one, if there
// was one. If that cannot be read, nobody knows a token that opens the public
// port, until the node sends another configuration.
func (s *Server) recall() {
	if s.cfg.State == nil {
		return
	}
	k, err := readState(s.cfg.State)
	if errors.Is(err, io.EOF) {
		return // the first
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.log.Error("the configuration is lost; the public port is closed until the node sends it again", "err", err)
		s.state.token = rand.Text()
		return
	}
	s.state = settings{env: k.Env, token: k.Token, user: k.User, workdir: k.Workdir,
		lifecycle: k.Lifecycle, generation: k.Generation, control: k.Control, instance: k.Instance, timestamp: k.Timestamp}
	if s.state.env == nil {
		s.state.env = map[string]string{}
	}
	if !k.Timestamp.IsZero() {
		s.state.anchor = time.Now().Add(k.Age - sinceBoot())
	}
}

// readState reads what keep wrote. The error is io.EOF if that was nothing.
func readState(f io.ReaderAt) (keptState, error) {
	var k keptState
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxState))
	switch {
	case err != nil:
		return k, fmt.Errorf("reading the configuration: %w", err)
	case len(b) == 0:
		return k, io.EOF
	case len(b) < stateHeader:
		return k, errors.New("the kept configuration has no header")
	}
	n, sum, text := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), b[stateHeader:]
	if uint64(n) > uint64(len(text)) || crc32.ChecksumIEEE(text[:n]) != sum {
		return k, errors.New("the kept configuration is damaged")
	}
	if err := json.Unmarshal(text[:n], &k); err != nil {
		return k, fmt.Errorf("decoding the configuration: %w", err)
	}
	return k, nil
}
