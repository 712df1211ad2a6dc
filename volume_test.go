package main

// Disks that a test can fill, freeze and cut off: ext4 in a file, mounted by a loop device.

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A volume is such a disk.
type volume struct {
	tb    testing.TB
	image string
	dir   string // where it is mounted
}

// newVolume makes and mounts a volume. Make it before the cluster that uses it: what is made
// first is cleaned up last.
func newVolume(tb testing.TB, mib int64) *volume {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root: it mounts file systems")
	}
	for _, tool := range []string{"mkfs.ext4", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			tb.Skipf("needs %s, and loop devices", tool)
		}
	}
	at := tb.TempDir()
	v := &volume{tb: tb, image: filepath.Join(at, "image"), dir: filepath.Join(at, "mnt")}
	f, err := os.OpenFile(v.image, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		tb.Fatal(err)
	}
	err = errors.Join(f.Truncate(mib<<20), f.Close(), os.Mkdir(v.dir, 0o700))
	if err != nil {
		tb.Fatal(err)
	}
	// Nothing is reserved for root, as whom these tests run: full is full.
	if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", v.image).CombinedOutput(); err != nil {
		tb.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", v.image, v.dir).CombinedOutput(); err != nil {
		tb.Skipf("needs loop devices that can be mounted: %v: %s", err, out)
	}
	tb.Cleanup(func() { syscall.Unmount(v.dir, unix.MNT_DETACH) })
	return v
}

// hold puts the node's data directory on the volume.
func (v *volume) hold(n *node) {
	n.args = append(n.args, "-data", v.dir)
	n.data = filepath.Join(v.dir, n.id)
}

// free returns how many bytes are free.
func (v *volume) free() int64 {
	v.tb.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(v.dir, &st); err != nil {
		v.tb.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

// fill leaves as many bytes free; empty gives the rest back.
func (v *volume) fill(leave int64) {
	v.tb.Helper()
	f, err := os.OpenFile(v.filler(), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		v.tb.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, v.free()-leave); err != nil {
		v.tb.Fatal(err)
	}
}

// empty ends fill.
func (v *volume) empty() {
	v.tb.Helper()
	if err := os.Remove(v.filler()); err != nil {
		v.tb.Fatal(err)
	}
}

func (v *volume) filler() string { return filepath.Join(v.dir, "filler") }

// ioctl does a request of the file system.
func (v *volume) ioctl(name string, request uintptr, arg uint32) {
	v.tb.Helper()
	d, err := os.Open(v.dir)
	if err != nil {
		v.tb.Fatal(err)
	}
	defer d.Close()
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, d.Fd(), request, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		v.tb.Fatalf("%s %s: %v", name, v.dir, errno)
	}
}

// How a volume loses its power.
const (
	cutFlush = 0 // what the journal holds reaches the disk
	cutHard  = 2 // EXT4_GOING_FLAGS_NOLOGFLUSH: not even that
)

// cut takes the power away: from now on nothing reaches the disk, and every call fails.
func (v *volume) cut(how uint32) {
	v.tb.Helper()
	v.ioctl("EXT4_IOC_SHUTDOWN", 0x8004587d, how)
}

// freeze makes every write hang; thaw lets them go on.
func (v *volume) freeze() { v.tb.Helper(); v.ioctl("FIFREEZE", 0xc0045877, 0) }
func (v *volume) thaw()   { v.tb.Helper(); v.ioctl("FITHAW", 0xc0045878, 0) }

// remount gives the power back. Nobody may use the volume. It is asked again after an error: the
// kernel may hold on to a file system for a moment, and would mount the dead one again.
func (v *volume) remount() error {
	if err := syscall.Unmount(v.dir, 0); err != nil && !errors.Is(err, syscall.EINVAL) { // not mounted
		return fmt.Errorf("unmount %s: %w", v.dir, err)
	}
	devices, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, d := range devices {
		if of, err := os.ReadFile(d); err == nil && strings.TrimSpace(string(of)) == v.image {
			return fmt.Errorf("%s: still in use, perhaps by a process with mounts of its own", d)
		}
	}
	if out, err := exec.Command("mount", "-o", "loop", v.image, v.dir).CombinedOutput(); err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	return nil
}
