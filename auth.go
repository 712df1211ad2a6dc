package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"
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

// A caller is who made a request, as its key proves.
type caller struct {
	principal string // the actor in the audit trail; empty on public routes
	role      role
	key       [sha256.Size]byte // the digest of the key, by which its streams are counted
}

// An auth knows the keys. It keeps their digests only.
type auth struct {
	keys []authKey
}

type authKey struct {
	digest [sha256.Size]byte
	caller caller
}

func newAuth(keys []apiKey) *auth {
	a := &auth{}
	for _, k := range keys {
		digest := sha256.Sum256([]byte(k.Key))
		a.keys = append(a.keys, authKey{digest, caller{k.actor(), roles[k.Role], digest}})
	}
	return a
}

// identify says who makes a request and whether he may use a route that needs the role.
// X-API-Key counts before Authorization. The errors are errUnauthorized and errForbidden.
func (a *auth) identify(r *http.Request, need role) (caller, error) {
	if need == public {
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
	who := a.keys[found].caller
	if who.role < need {
		return who, errForbidden.because("this key is a reader's; the request needs an admin's")
	}
	return who, nil
}
