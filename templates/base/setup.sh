#!/bin/sh
# Runs once, as root, inside the new root file system, after the packages are
# in place and before the image is made. No network. Whatever it prints goes to
# the build log; a failing line fails the build.
set -eu

# --- the user that commands run as by default ------------------------------
# Same name, id and rights as the E2B base template: clients rely on them.
useradd --uid 1000 --user-group --create-home --home-dir /home/user \
	--shell /bin/bash --comment '' user
usermod -aG sudo user
passwd -d user >/dev/null
echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/user
chmod 0440 /etc/sudoers.d/user
# .profile adds this folder to PATH only when it exists; pip puts commands there.
install -d -o user -g user -m 0755 /home/user/.local /home/user/.local/bin
# sudo prints its lecture on the first use; a program reads that as an error.
echo 'Defaults lecture=never' >/etc/sudoers.d/lecture
chmod 0440 /etc/sudoers.d/lecture

# Agents install at once, globally, as the plain user: `npm install -g`,
# `pip install`, scripts into /usr/local/bin. A sandbox has one user.
chmod -R a+rwX /usr/local

# --- Python ----------------------------------------------------------------
# PEP 668 makes pip refuse to install beside Debian's packages. A sandbox is
# thrown away, so the protection only costs its user a failed first command.
# A diversion, unlike a removal, survives an upgrade of the package.
for marker in /usr/lib/python3.*/EXTERNALLY-MANAGED; do
	[ -e "$marker" ] || continue
	dpkg-divert --quiet --local --rename --divert "$marker.disabled" --add "$marker"
done

# --- /tmp on the sandbox's disk --------------------------------------------
# gVisor lays a tmpfs, which is RAM, over an empty /tmp. One folder in it, of a
# kind that every desktop system has there, keeps /tmp on the disk.
chmod 1777 /tmp /var/tmp
install -d -o root -g root -m 1777 /tmp/.X11-unix
install -d -m 0755 /run/screen /run/sshd
ln -sfn /proc/self/mounts /etc/mtab

# --- names -----------------------------------------------------------------
cat >/etc/hosts <<'HOSTS'
127.0.0.1	localhost
::1	localhost ip6-localhost ip6-loopback
HOSTS
rm -f /etc/hostname /run/adduser # the first is the build host's, with its mode
echo sandbox >/etc/hostname
sed -i 's/^hosts:.*/hosts: files myhostname dns/' /etc/nsswitch.conf
cat >/etc/resolv.conf <<'RESOLV'
nameserver 1.1.1.1
nameserver 8.8.8.8
options timeout:2 attempts:3
RESOLV
echo 'LANG=C.UTF-8' >/etc/default/locale
: >/etc/machine-id

# --- apt and dpkg inside a sandbox -----------------------------------------
# Nothing of the build host's settings (its proxy, say) may stay.
rm -f /etc/apt/apt.conf.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/99mmdebstrap
cat >/etc/apt/apt.conf.d/90sandbox <<'APT'
Acquire::Languages "none";
Acquire::Retries "3";
APT::Install-Recommends "false";
Dpkg::Use-Pty "false";
APT
# A sandbox's disk does not outlive a power cut anyway; fsync per file is what
# makes dpkg slow.
cat >/etc/dpkg/dpkg.cfg.d/sandbox <<'DPKG'
force-unsafe-io
path-exclude=/usr/share/man/*
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-include=/usr/share/locale/locale.alias
DPKG
# There is no init system that a package's start script could talk to.
cat >/usr/sbin/policy-rc.d <<'POLICY'
#!/bin/sh
exit 101
POLICY
chmod 0755 /usr/sbin/policy-rc.d

# --- what differs from build to build --------------------------------------
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old \
	/var/lib/dpkg/*-old /var/log/apt /var/log/*.log /var/log/btmp /var/log/lastlog \
	/var/log/faillog /var/log/wtmp /var/cache/ldconfig/aux-cache \
	/etc/ssh/ssh_host_* /root/.npm /root/.cache /var/lib/systemd/random-seed
install -d -m 0755 /var/log/apt /var/cache/apt/archives/partial /var/lib/apt/lists/partial
# Compiled Python is written on first import otherwise, into the guest's disk.
python3 -m compileall -q -j 0 /usr/lib/python3/dist-packages >/dev/null 2>&1 || true
