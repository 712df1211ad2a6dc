package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
)

// A kind is one kind of problem. As an error it is what errors.Is looks for.
type kind struct {
	slug    string
	status  int
	title   string
	outcome string // of a write; not-applied unless said
}

func (k *kind) Error() string { return k.slug }

// because makes a problem of kind k; the text says what to do next and goes to the client.
func (k *kind) because(format string, args ...any) error {
	return &problem{kind: k, detail: fmt.Sprintf(format, args...)}
}

// quoting is because with words of the client's in the text, which may be a secret in the wrong
// place. They are not logged.
func (k *kind) quoting(format string, args ...any) error {
	return &problem{kind: k, detail: fmt.Sprintf(format, args...), quotes: true}
}

// These are every failure that a client can cause or must expect. What is not here is our
// own fault: a 500 that tells the client nothing and the log everything.
var (
	errBadRequest           = &kind{slug: "bad-request", status: 400, title: "Bad Request"}
	errUnauthorized         = &kind{slug: "unauthorized", status: 401, title: "Unauthorized"}
	errForbidden            = &kind{slug: "forbidden", status: 403, title: "Forbidden"}
	errNotFound             = &kind{slug: "not-found", status: 404, title: "Not Found"}
	errMethodNotAllowed     = &kind{slug: "method-not-allowed", status: 405, title: "Method Not Allowed"}
	errConflict             = &kind{slug: "conflict", status: 409, title: "Conflict"}
	errGone                 = &kind{slug: "gone", status: 410, title: "Not In The Trail"}
	errPrecondition         = &kind{slug: "precondition-failed", status: 412, title: "Precondition Failed"}
	errTooLarge             = &kind{slug: "too-large", status: 413, title: "Too Large"}
	errUnsupportedMediaType = &kind{slug: "unsupported-media-type", status: 415, title: "Unsupported Media Type"}
	errInvalidValue         = &kind{slug: "invalid-value", status: 422, title: "Invalid Value"}
	errTooMany              = &kind{slug: "too-many-requests", status: 429, title: "Too Many Requests"}
	errNotLeader            = &kind{slug: "not-leader", status: 307, title: "Not The Leader"}
	errNoLeader             = &kind{slug: "no-leader", status: 503, title: "No Leader"}
	errStaleRead            = &kind{slug: "stale-read", status: 503, title: "Too Far Behind"}
	errBehind               = &kind{slug: "behind", status: 503, title: "Behind The Revision Asked For"}
	errUnavailable          = &kind{slug: "unavailable", status: 503, title: "Unavailable"}
	errUnknown              = &kind{slug: "outcome-unknown", status: 504, title: "Outcome Unknown", outcome: "unknown"}
	errNoSpace              = &kind{slug: "no-space", status: 507, title: "No Space"}
	errInternal             = &kind{slug: "internal", status: 500, title: "Internal Error", outcome: "unknown"}
)

// A problem is an error that a client is told about.
type problem struct {
	kind    *kind
	detail  string
	cause   error    // for the log only
	current *current // of a failed precondition
	quotes  bool     // the detail is not for the log
}

func (p *problem) Error() string {
	if p.quotes {
		return p.kind.slug + ": the answer says why, with words of the request"
	}
	if p.cause != nil {
		return fmt.Sprintf("%s: %s: %v", p.kind.slug, p.detail, p.cause)
	}
	return p.kind.slug + ": " + p.detail
}

func (p *problem) Unwrap() error { return p.kind }

// in says which member of a body the problem is in.
func (p *problem) in(member string) error {
	q := *p
	q.detail = strconv.Quote(clip(member, 100)) + ": " + p.detail
	return &q
}

func preconditionFailed(cur *current, detail string) error {
	return &problem{kind: errPrecondition, detail: detail, current: cur}
}

// problemOf is the problem in err, or an internal one that hides it.
func problemOf(err error) *problem {
	var p *problem
	if errors.As(err, &p) {
		return p
	}
	return &problem{kind: errInternal, detail: "the node's log has the cause under this correlation id", cause: err}
}

// A problemDocument is an RFC 9457 document.
type problemDocument struct {
	Type          string          `json:"type"`
	Title         string          `json:"title"`
	Status        int             `json:"status"`
	Detail        string          `json:"detail"`
	Instance      string          `json:"instance"`
	CorrelationID string          `json:"correlationId"`
	Outcome       string          `json:"outcome,omitempty"`
	Current       json.RawMessage `json:"current,omitempty"`
}
