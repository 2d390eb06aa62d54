package authority

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"testing"
	"time"
)

func make1(t *testing.T, name string) Authority {
	t.Helper()
	now := time.Now()
	a, err := New(x509.Certificate{Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestIssue: what an authority issues is trusted by who trusts it, also after
// it was written and read, and by nobody else.
func TestIssue(t *testing.T) {
	made := make1(t, "one")
	private, err := made.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	read, err := Parse(made.CertPEM(), private)
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := x509.Certificate{DNSNames: []string{"a.example"}, NotBefore: made.Cert.NotBefore, NotAfter: made.Cert.NotAfter}
	leaf, err := read.Issue(tmpl, &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		root Authority
		name string
		good bool
	}{{made, "a.example", true}, {made, "b.example", false}, {make1(t, "one"), "a.example", false}} {
		roots := x509.NewCertPool()
		roots.AddCert(c.root.Cert)
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: c.name}); (err == nil) != c.good {
			t.Errorf("%s, by its own authority: %t: %v", c.name, c.root.Cert.Equal(made.Cert), err)
		}
	}
	other, err := read.Issue(tmpl, &key.PublicKey)
	if err != nil || other.SerialNumber.Cmp(leaf.SerialNumber) == 0 {
		t.Errorf("two certificates have one number: %v", err)
	}
}

func TestParse(t *testing.T) {
	a, b := make1(t, "a"), make1(t, "b")
	key, err := b.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	leafKey, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := a.Issue(x509.Certificate{NotBefore: a.Cert.NotBefore, NotAfter: a.Cert.NotAfter}, &leafKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	noCA := Authority{Cert: leaf, Key: leafKey}
	leafPEM, err := noCA.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string][2][]byte{
		"empty":              {nil, nil},
		"no PEM":             {[]byte("x"), []byte("y")},
		"another one's key":  {a.CertPEM(), key},
		"not an authority's": {noCA.CertPEM(), leafPEM},
	} {
		if _, err := Parse(c[0], c[1]); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
