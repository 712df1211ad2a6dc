package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// A role is what a key may do. Each includes the ones before it.
type role int

const (
	public role = iota // no key is asked for
	reader             // reads
	admin              // reads and writes, and reads the trail of everything
)

// roles are the names of roles in the configuration file.
var roles = map[string]role{"reader": reader, "admin": admin}

// A scope is what a route shows or changes, and so what a key that is limited to some namespaces
// may do with it.
type scope int

const (
	wholeStore    scope = iota // more than one namespace: nothing
	oneNamespace               // the one in its path: what the role allows, if the namespace is one of the key's
	ownNamespaces              // it shows each key that key's own: what the role allows
	noNamespace                // what the role allows
)

// A caller is who made a request, as its key proves.
type caller struct {
	principal  string // the actor in the audit trail; empty on public routes
	role       role
	key        [sha256.Size]byte // the digest of the key, by which its streams are counted
	namespaces []string          // names, and prefixes with * behind them; nil for all
	// held ends when the key is no longer what it was: gone, expired or changed. What goes on for
	// longer than an answer takes then asks identify again. nil without a key.
	held context.Context
}

// over is closed when held ends.
func (k caller) over() <-chan struct{} {
	if k.held == nil {
		return nil
	}
	return k.held.Done()
}

// covers reports whether the key is for a namespace, which need not exist.
func (k caller) covers(ns string) bool {
	return k.namespaces == nil || slices.ContainsFunc(k.namespaces, func(p string) bool {
		prefix, ok := strings.CutSuffix(p, "*")
		return p == ns || ok && strings.HasPrefix(ns, prefix)
	})
}

// An auth knows the keys. It keeps their digests only. The keys that an auth has are the same for
// its life; server.auth is replaced as a whole.
type auth struct {
	keys []*authKey
}

// An authKey is one key. Only keepKeys writes to it once it is in use.
type authKey struct {
	digest   [sha256.Size]byte
	caller   caller
	notAfter time.Time   // zero: it does not expire
	past     atomic.Bool // see expired
	end      context.CancelFunc
}

// newAuth makes an auth of checked keys. A key that is in before, with the same rights, is taken over
// from there with whatever it holds; before may be nil.
func newAuth(keys []apiKey, before *auth) *auth {
	a := &auth{}
	for _, k := range keys {
		digest, _ := k.digest() // checked
		key := &authKey{digest: digest, caller: caller{principal: k.actor(), role: roles[k.Role], key: digest, namespaces: k.Namespaces}, notAfter: k.notAfter}
		if before != nil {
			if i := slices.IndexFunc(before.keys, key.same); i >= 0 {
				a.keys = append(a.keys, before.keys[i])
				continue
			}
		}
		key.caller.held, key.end = context.WithCancel(context.Background())
		a.keys = append(a.keys, key)
	}
	return a
}

// same reports whether two keys are one, with the same rights, which it still has.
func (k *authKey) same(o *authKey) bool {
	return k.digest == o.digest && k.caller.principal == o.caller.principal && k.caller.role == o.caller.role &&
		slices.Equal(k.caller.namespaces, o.caller.namespaces) && k.notAfter.Equal(o.notAfter) && !o.past.Load()
}

// identify says who makes a request and whether he may use a route, with the namespace of its path
// if it has one. It does not look at what exists. X-API-Key counts before Authorization. The errors
// are errUnauthorized and errForbidden.
func (a *auth) identify(r *http.Request, rt *route, ns string) (caller, error) {
	if rt.role == public {
		return caller{}, nil
	}
	key, given := "", false
	if v := r.Header["X-Api-Key"]; len(v) > 0 {
		key, given = v[0], true
	} else if v := r.Header["Authorization"]; len(v) > 0 {
		scheme, token, ok := strings.Cut(v[0], " ")
		if ok && strings.EqualFold(scheme, "Bearer") {
			key, given = strings.TrimLeft(token, " "), true
		}
	}
	if !given {
		return caller{}, errUnauthorized.because("send a key, as X-API-Key: KEY or Authorization: Bearer KEY")
	}
	// All keys are compared, each in constant time, so that the time says nothing about
	// which one it is or how much of it is right.
	digest := sha256.Sum256([]byte(key))
	found := -1
	for i := range a.keys {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(digest[:], a.keys[i].digest[:]), i, found)
	}
	if found < 0 {
		return caller{}, errUnauthorized.because("the key is not known here")
	}
	k := a.keys[found]
	who := k.caller
	switch {
	case k.expired(time.Now()):
		// Only who has the key reads this, and its owner would look for another cause in vain.
		return who, errUnauthorized.because("this key expired at %s; use another", k.notAfter.UTC().Format(time.RFC3339))
	case who.role < rt.role:
		return who, errForbidden.because("this key is a reader's; the request needs an admin's")
	case who.namespaces == nil:
		return who, nil
	case rt.scope == wholeStore:
		return who, errForbidden.because("this key is limited to some namespaces; the request needs one that is not")
	case rt.scope == oneNamespace && !who.covers(ns):
		return who, errForbidden.because("this key is limited to namespaces that this is none of; use another key")
	}
	return who, nil
}

// expired reports whether the key is past its time. One that was, once, stays so: the clock may be
// set back, but what the key held has ended.
func (k *authKey) expired(now time.Time) bool {
	return !k.notAfter.IsZero() && (k.past.Load() || now.After(k.notAfter))
}

// identify finds out who makes the request and whether he may. It is asked again when c.who is over.
func (c *call) identify() (err error) {
	if c.who, err = c.s.auth.Load().identify(c.r, c.route, c.ns); err != nil && problemOf(err).kind == errUnauthorized {
		c.w.Header().Set("WWW-Authenticate", `Bearer realm="confman"`)
	}
	return err
}

// stillAllowed is for what waits: it returns why the request may not go on, if the key is not what
// it was when the request began.
func (c *call) stillAllowed() error {
	if c.who.held == nil || c.who.held.Err() == nil {
		return nil
	}
	return c.identify()
}

// expiryPace is how often keys are looked at that expire.
const expiryPace = 250 * time.Millisecond

// keepKeys reads the configuration file again for each signal and ends what expired keys hold,
// until the node stops.
func (s *server) keepKeys(hup <-chan os.Signal) {
	for {
		var look <-chan time.Time
		// A timer for the moment itself would not notice that the clock is set.
		if s.auth.Load().endExpired(s) {
			look = time.After(expiryPace)
		}
		select {
		case <-hup:
			s.reload()
		case <-look:
		case <-s.ending:
			return
		}
	}
}

// endExpired ends what keys hold that have expired, and reports whether there are more that will.
func (a *auth) endExpired(s *server) (more bool) {
	for _, k := range a.keys {
		switch {
		case k.notAfter.IsZero() || k.past.Load():
		case k.expired(time.Now()):
			k.past.Store(true)
			k.end()
			s.log.Warn("an API key has expired", "principal", k.caller.principal, "notAfter", k.notAfter)
		default:
			more = true
		}
	}
	return more
}

// setKeys replaces the keys. What is held by a key that is not taken over unchanged asks again
// whether it may go on.
func (s *server) setKeys(keys []apiKey) {
	old := s.auth.Load()
	next := newAuth(keys, old)
	s.auth.Store(next)
	for _, k := range old.keys {
		if !slices.Contains(next.keys, k) {
			k.end()
		}
	}
}

// An apiKey is a key in the configuration file.
type apiKey struct {
	// Key is the key as it is sent, or sha256: and the digest of that in hex. A digest is no key: it
	// lets nobody in who sends it.
	Key        string
	Name       string
	Principal  string
	Role       string
	Namespaces []string // see caller; missing: all
	NotAfter   *string  // RFC 3339; missing: it does not expire

	notAfter time.Time // NotAfter, once it is checked
}

// actor is who the audit trail says did it.
func (k apiKey) actor() string {
	if k.Principal != "" {
		return k.Principal
	}
	return k.Name
}

// hashed is what a Key begins with that is a digest.
const hashed = "sha256:"

// clear reports whether the file holds the key itself.
func (k apiKey) clear() bool {
	return len(k.Key) < len(hashed) || !strings.EqualFold(k.Key[:len(hashed)], hashed)
}

// digest is the SHA-256 of the key as it is sent.
func (k apiKey) digest() (d [sha256.Size]byte, err error) {
	if k.clear() {
		return sha256.Sum256([]byte(k.Key)), nil
	}
	b, err := hex.DecodeString(k.Key[len(hashed):])
	if err != nil || len(b) != len(d) {
		return d, errors.New("sha256: is not followed by the 64 hex digits of a digest")
	}
	if [sha256.Size]byte(b) == sha256.Sum256(nil) { // of a variable that was not set
		return d, errors.New("sha256: is followed by the digest of nothing")
	}
	return [sha256.Size]byte(b), nil
}

// check finds the first mistake in a key, which the file calls at; its error begins with the member's
// name. digest is the key's.
func (k *apiKey) check(at string) (digest [sha256.Size]byte, err error) {
	if k.Key == "" || strings.TrimSpace(k.Key) != k.Key || strings.ContainsFunc(k.Key, func(r rune) bool { return r < ' ' || r > '~' }) {
		return digest, fmt.Errorf("%s.Key: missing, or not printable ASCII as a header needs", at)
	}
	if digest, err = k.digest(); err != nil {
		return digest, fmt.Errorf("%s.Key: %w", at, err)
	}
	if k.actor() == "" {
		return digest, fmt.Errorf("%s.Name: missing, and so is Principal; the audit trail needs one", at)
	}
	if strings.ContainsFunc(k.actor(), isControl) {
		return digest, fmt.Errorf("%s.Principal: holds a control character", at)
	}
	if roles[k.Role] == public {
		return digest, fmt.Errorf("%s.Role: %q must be reader or admin", at, k.Role)
	}
	if k.Namespaces != nil && len(k.Namespaces) == 0 {
		return digest, fmt.Errorf("%s.Namespaces: empty; leave it out for all namespaces, or remove the key", at)
	}
	for i, p := range k.Namespaces {
		// What is before the * begins a name, so it is one, or nothing.
		if name, prefix := strings.CutSuffix(p, "*"); !validNamespace(name) && (name != "" || !prefix) {
			return digest, fmt.Errorf("%s.Namespaces[%d]: %q is neither a namespace nor the beginning of one with * behind it", at, i, p)
		}
	}
	if k.NotAfter != nil {
		if k.notAfter, err = time.Parse(time.RFC3339, *k.NotAfter); err != nil {
			return digest, fmt.Errorf("%s.NotAfter: %q is not a time such as 2027-01-31T00:00:00Z", at, *k.NotAfter)
		}
	}
	return digest, nil
}

// newSecret is 256 random bits.
func newSecret() []byte {
	b := make([]byte, 32)
	rand.Read(b)
	return b
}

// newKey makes a key.
func newKey() string { return "cm_" + base64.RawURLEncoding.EncodeToString(newSecret()) }

// keygen prints a new key and what stands for it in the configuration file, or a new secret.
func keygen(w io.Writer, what string) error {
	if what == "secret" {
		_, err := fmt.Fprintln(w, base64.StdEncoding.EncodeToString(newSecret()))
		return err
	}
	key := newKey()
	_, err := fmt.Fprintf(w, "%s\n"+`{"Key": "%s%x", "Name": "what it is for", "Principal": "who@where", "Role": "reader"}`+"\n",
		key, hashed, sha256.Sum256([]byte(key)))
	return err
}
