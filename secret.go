package main

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"time"
)

// A secret is what the nodes of a cluster have in common and nobody else has. From it every node
// makes a key for each node, and so knows everyone's public key: there is no CA, nothing to hand
// out and nothing that expires. A key per node is there for connections that go astray, by a wrong
// address or a port that another node has taken: they fail. It is no protection against a
// treacherous node, since whoever has the secret can be every node.
type secret []byte

// minSecret is how many bytes a secret has at least: as many as the keys that are made of it.
const minSecret = 32

// Format implements fmt.Formatter. No verb shows a secret.
func (secret) Format(w fmt.State, _ rune) { io.WriteString(w, "(secret)") }

// parseSecret reads a secret in hex or base64, of either alphabet, padded or not. What can be both
// is hex. Its errors hold nothing of the text.
func parseSecret(text string) (secret, error) {
	b, err := hex.DecodeString(text)
	if err != nil {
		std := strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(text, "="))
		b, err = base64.RawStdEncoding.Strict().DecodeString(std)
	}
	if err != nil || strings.ContainsAny(text, "\r\n") { // base64 skips line ends
		return nil, errors.New("neither base64 nor hex")
	}
	if len(b) < minSecret {
		return nil, fmt.Errorf("%d bytes; at least %d are needed, drawn at random", len(b), minSecret)
	}
	return b, nil
}

// readSecrets returns the secrets of Cluster.Secret or Cluster.Secrets, none where both are
// missing. Its error begins with the member's name.
func (c *config) readSecrets() ([]secret, error) {
	texts := c.Cluster.Secrets
	name := func(i int) string { return fmt.Sprintf("Cluster.Secrets[%d]", i) }
	switch one := c.Cluster.Secret; {
	case one != nil && texts != nil:
		return nil, errors.New("Cluster.Secrets: excludes Cluster.Secret; put the new one first in Secrets")
	case one != nil:
		texts, name = []string{*one}, func(int) string { return "Cluster.Secret" }
	case texts != nil && len(texts) == 0:
		return nil, errors.New("Cluster.Secrets: empty; leave it out for a cluster without a secret")
	}
	var all []secret
	for i, text := range texts {
		s, err := parseSecret(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name(i), err)
		}
		if j := slices.IndexFunc(all, func(other secret) bool { return string(other) == string(s) }); j >= 0 {
			return nil, fmt.Errorf("%s: the same as %s", name(i), name(j))
		}
		all = append(all, s)
	}
	return all, nil
}

// nodeKey makes the key of a node.
func (s secret) nodeKey(id string) ed25519.PrivateKey {
	seed, err := hkdf.Key(sha256.New, s, nil, "confman node key 1 "+id, ed25519.SeedSize)
	if err != nil {
		panic(err) // the length is wrong, and it is a constant
	}
	return ed25519.NewKeyFromSeed(seed)
}

// nodeCertificate makes a certificate for a node's key. It is the same each time. Only its key
// counts; the rest is what X.509 asks for, an end of time included.
func nodeCertificate(id string, key ed25519.PrivateKey) (tls.Certificate, error) {
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: id},
		NotBefore: time.Unix(0, 0).UTC(), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// A keyring is what a node shows of itself and by what it knows others. A nil one is of a cluster
// without a secret, where nobody proves anything. It does not change.
type keyring struct {
	own     tls.Certificate // by the first secret
	secrets []secret
}

// newKeyring makes the keyring of node self. The first secret is shown and all are accepted;
// without any it returns nil.
func newKeyring(secrets []secret, self string) (*keyring, error) {
	if len(secrets) == 0 {
		return nil, nil
	}
	own, err := nodeCertificate(self, secrets[0].nodeKey(self))
	return &keyring{own: own, secrets: secrets}, err
}

// knows reports whether a public key is that of a node. In plain text there is none: "".
//
// A certificate names its node, and the key of any id can be made, so no list of ids is needed. None
// would do: a node that was away while others joined hears of them from the leader, who may be one.
func (k *keyring) knows(node, key string) bool {
	if k == nil {
		return key == ""
	}
	return nodeID.MatchString(node) && slices.ContainsFunc(k.secrets, func(s secret) bool {
		return string(s.nodeKey(node).Public().(ed25519.PublicKey)) == key
	})
}

// config is for either end of a connection whose other end must be a node that meant takes.
func (k *keyring) config(meant func(node string) bool) *tls.Config {
	return &tls.Config{
		Certificates:       []tls.Certificate{k.own},
		MinVersion:         tls.VersionTLS13,
		ClientAuth:         tls.RequireAnyClientCert,
		InsecureSkipVerify: true, // there is no CA; VerifyConnection looks at the key instead
		VerifyConnection: func(s tls.ConnectionState) error {
			node, key := proved(s)
			if !k.knows(node, key) {
				return errors.New("the certificate is not of a node of this cluster by a secret that is accepted here")
			}
			if !meant(node) {
				return fmt.Errorf("the certificate is that of node %s, for which this connection is not", node)
			}
			return nil
		},
		// Connections last; resuming them would gain nothing.
		SessionTicketsDisabled: true,
		// Small records at first are for readers who wait for the first bytes of a page.
		DynamicRecordSizingDisabled: true,
	}
}

// proved is who the other end of a connection says it is, and the public key that it has proved to
// have; "" if none.
func proved(s tls.ConnectionState) (node, key string) {
	if len(s.PeerCertificates) == 0 {
		return "", ""
	}
	cert := s.PeerCertificates[0]
	pub, _ := cert.PublicKey.(ed25519.PublicKey)
	return cert.Subject.CommonName, string(pub)
}
