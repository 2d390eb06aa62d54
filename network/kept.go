package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// Refusals are kept in a file for each slot: a line of JSON for each as it was
// at some time, a later line of the same instead of an earlier one.

const (
	// mostLines is how many lines a file gets before it is written anew.
	mostLines = 4 * maxRefusals
	// keepAfter is for how long a refusal may be in memory only. What somebody
	// has read is in the file.
	keepAfter = time.Second
)

func (p *Pool) refusalFile(index int) string {
	if p.RefusalDir == "" {
		return ""
	}
	return filepath.Join(p.RefusalDir, strconv.Itoa(index)+refusalSuffix)
}

const refusalSuffix = ".jsonl"

// prepareRefusals makes the directory and removes files of slots that are gone.
func (p *Pool) prepareRefusals(found map[int]bool) error {
	if p.RefusalDir == "" {
		return nil
	}
	if err := os.MkdirAll(p.RefusalDir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(p.RefusalDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		name, _ := strings.CutSuffix(e.Name(), refusalSuffix)
		if i, err := strconv.Atoi(name); err != nil || !found[i] {
			errs = append(errs, os.Remove(filepath.Join(p.RefusalDir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// keepRefusals writes down what is refused until ctx ends.
func (p *Pool) keepRefusals(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.refusing:
		}
		p.rest(ctx, keepAfter, nil)
		p.mu.Lock()
		all := make(map[int]*tenant, len(p.tenants))
		for i, t := range p.tenants {
			all[i] = t
		}
		p.mu.Unlock()
		for i, t := range all {
			p.keep(i, t)
		}
	}
}

// keep writes down what a slot's file does not have yet.
func (p *Pool) keep(index int, t *tenant) {
	if err := t.log.save(); err != nil {
		p.log().Warn("refusals of a sandbox are not kept over a restart", "slot", index, "err", err)
	}
}

// endRefusals removes the file of a slot that is given back.
func (p *Pool) endRefusals(index int) {
	var err error
	if t, _ := p.tenant(index); t != nil {
		err = t.log.end()
	} else {
		err = wholefile.Remove(p.refusalFile(index))
	}
	if err != nil {
		p.log().Warn("the refusals of a sandbox that is gone stay on disk", "slot", index, "err", err)
	}
}

// keepSoon has the refusals written down soon.
func (p *Pool) keepSoon() {
	select {
	case p.refusing <- struct{}{}:
	default:
	}
}

// load takes in what an earlier process has kept, and goes on counting there.
// Half a line, of one that was killed, is left out.
func (l *refusalLog) load() error {
	b, err := os.ReadFile(l.path)
	if l.path == "" || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	whole := true
	for line := range bytes.Lines(b) {
		var r cay.EgressRefusal
		if json.Unmarshal(line, &r) != nil || r.Seq <= l.seq || line[len(line)-1] != '\n' {
			whole = false
			continue
		}
		l.lines++
		l.putLocked(r)
	}
	l.saved = l.seq
	if !whole {
		l.lines = mostLines
	}
	return nil
}

// save appends to the file what has come since the last time.
func (l *refusalLog) save() error {
	if l.path == "" {
		return nil
	}
	l.saving.Lock()
	defer l.saving.Unlock()
	if l.ended {
		return nil
	}
	fresh := l.after(l.saved)
	if len(fresh) == 0 {
		return nil
	}
	anew := l.lines+len(fresh) > mostLines
	if anew {
		fresh = l.after(0)
	}
	var b bytes.Buffer
	for _, r := range fresh {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		b.Write(append(line, '\n'))
	}
	var err error
	if anew {
		err = wholefile.Write(l.path, b.Bytes(), 0o600)
	} else {
		err = appendTo(l.path, b.Bytes())
	}
	if err != nil {
		l.lines = mostLines // half of it may be there
		return err
	}
	if anew {
		l.lines = 0
	}
	l.lines += len(fresh)
	l.saved = fresh[len(fresh)-1].Seq
	return nil
}

func appendTo(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// end removes the file for good.
func (l *refusalLog) end() error {
	l.saving.Lock()
	defer l.saving.Unlock()
	l.ended = true
	return wholefile.Remove(l.path)
}
