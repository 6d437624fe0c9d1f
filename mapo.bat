@echo off
rem Sets up .venv on first use (scripts\setup.py), then runs the command line; mapo is its twin.
setlocal DisableDelayedExpansion
set "mapo_root=%~dp0"
set "mapo_venv_python=%mapo_root%.venv\Scripts\python.exe"
set "mapo_python="

if exist "%mapo_venv_python%" set mapo_python="%mapo_venv_python%"
call :find python
call :find py -3.13
call :find py -3.12
call :find py -3.11
call :find python3
if not defined mapo_python goto no_python

if "%~1"=="test" goto test
set "mapo_level=run"
if "%~1"=="ui" set "mapo_level=ui"
call %mapo_python% -I -S "%mapo_root%scripts\setup.py" %mapo_level%
if not "%errorlevel%"=="0" exit /b 1
"%mapo_venv_python%" "%mapo_root%mapo_core\__main__.py" %*
exit /b %errorlevel%

:test
call %mapo_python% -I -S "%mapo_root%scripts\setup.py" dev
if not "%errorlevel%"=="0" exit /b 1
rem A batch file cannot drop its first argument: check.py skips the word test.
"%mapo_venv_python%" "%mapo_root%scripts\check.py" %*
exit /b %errorlevel%

:no_python
echo mapo needs Python 3.11, 3.12 or 3.13, and none was found on PATH. 1>&2
echo Install one from python.org with "Add python.exe to PATH" ticked, then run this again. 1>&2
exit /b 1

rem The first Python that runs and fits: the name "python" alone may be the Store's stub, which starts nothing.
rem With "call", because a version manager's python may be a batch file, from which there is no return without it.
:find
if defined mapo_python exit /b 0
call %* -c "import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12), (3, 13)])" >nul 2>nul
if "%errorlevel%"=="0" set "mapo_python=%*"
exit /b 0
