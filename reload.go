package main

import (
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"strings"
)

// reloaded are the members that reload puts into effect. What else has changed in the file waits for
// the next start.
var reloaded = []string{"Auth", "Cluster.Secret", "Cluster.Secrets"}

// reload reads the arguments and the configuration file again, as the start did, and puts the members
// of reloaded into effect: all of them, or none where the file has a mistake.
func (s *server) reload() {
	if s.cfg.file == "" {
		s.log.Warn("SIGHUP: there is no configuration file to read again")
		return
	}
	next, err := configure(s.cfg.args)
	if err != nil {
		s.log.Error("the configuration file has a mistake; what was read before stays in effect", "error", err)
		return
	}
	next.warn(s.log)
	if err := s.node.setSecrets(next.secrets); err != nil {
		s.log.Error("the secrets cannot be used; what was read before stays in effect", "error", err)
		return
	}
	// From here on nothing may fail.
	s.setKeys(next.Auth.ApiKeys)
	if changed := differences("", reflect.ValueOf(*s.cfg), reflect.ValueOf(*next)); len(changed) > 0 {
		s.log.Warn("changed in the configuration file, but in effect after the next start only", "members", strings.Join(changed, " "))
	}
	s.log.Info("configuration file read again", "keys", len(next.Auth.ApiKeys), "secrets", len(next.secrets))
}

// differences names the members, but for those of reloaded, that differ between two values of one
// struct, whose own name is path.
func differences(path string, a, b reflect.Value) (names []string) {
	for i := range a.NumField() {
		f := a.Type().Field(i)
		name := strings.TrimPrefix(path+"."+f.Name, ".")
		switch {
		case !f.IsExported() || slices.Contains(reloaded, name):
		case f.Type.Kind() == reflect.Struct:
			names = append(names, differences(name, a.Field(i), b.Field(i))...)
		case !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()):
			names = append(names, name)
		}
	}
	return names
}

// inClear names the members that hold a secret in clear.
func (c *config) inClear() (names []string) {
	if c.Cluster.Secret != nil {
		names = append(names, "Cluster.Secret")
	}
	if c.Cluster.Secrets != nil {
		names = append(names, "Cluster.Secrets")
	}
	for i, k := range c.Auth.ApiKeys {
		if k.clear() {
			names = append(names, fmt.Sprintf("Auth.ApiKeys[%d].Key", i))
		}
	}
	return names
}

// warn says what is allowed in a configuration but unwise.
func (c *config) warn(log *slog.Logger) {
	if c.file == "" {
		return
	}
	fi, err := os.Stat(c.file)
	if err != nil || fi.Mode()&0o004 == 0 { // what was read a moment ago and is gone, nobody reads
		return
	}
	if names := c.inClear(); len(names) > 0 {
		log.Warn("every user of this machine can read the configuration file, and it holds secrets in clear",
			"members", strings.Join(names, " "), "do", "chmod o-rwx "+c.file)
	}
}

// warnPlaintext says that a cluster without a secret can be reached from other machines.
func (c *config) warnPlaintext(log *slog.Logger) {
	if len(c.secrets) == 0 && !c.onLoopback() {
		log.Warn("the nodes talk in plain text: whoever reaches a Raft port owns the data; give the cluster a secret, Cluster.Secret")
	}
}
